"""A price is never changed or deleted: which rates an attempt was billed at can be told for ever."""

from django.db import migrations

FORWARD = """
CREATE FUNCTION llmtasks_price_is_kept() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'price % is kept: it can''t be changed or deleted', OLD.id
        USING ERRCODE = 'integrity_constraint_violation',
              HINT = 'Add a price that is effective later.';
END $$;

CREATE TRIGGER price_append_only BEFORE UPDATE OR DELETE ON llmtasks_price
    FOR EACH ROW EXECUTE FUNCTION llmtasks_price_is_kept();
"""

REVERSE = """
DROP TRIGGER price_append_only ON llmtasks_price;
DROP FUNCTION llmtasks_price_is_kept;
"""


class Migration(migrations.Migration):
    dependencies = [("llmtasks", "0002_triggers")]
    operations = [migrations.RunSQL(FORWARD, REVERSE)]
