"""A support desk's tools, as a Django app that `APPS` names."""
