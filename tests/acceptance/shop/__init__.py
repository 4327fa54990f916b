"""An app of a product: its tools."""
