"""What only the database can promise: a settled attempt never changes, and every change of
configuration raises `Config.version`, whoever made it.

The version comes from a sequence: it never repeats, even where rows were truncated.
"""

from django.db import migrations

# Table → the columns whose change counts ("" for any). `last_used_at` of a key is no change.
WATCHED = {
    "llmtasks_tenant": "",
    "llmtasks_apikey": "tenant_id, name, prefix, secret_hash, scopes, expires_at, revoked_at",
    "llmtasks_provider": "",
    "llmtasks_providermodel": "",
    "llmtasks_route": "",
    "llmtasks_routecandidate": "",
    "llmtasks_price": "",
}

FUNCTIONS = """
CREATE SEQUENCE llmtasks_config_version START 2;

CREATE FUNCTION llmtasks_raise_version() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO llmtasks_config (id, version, epoch)
    VALUES (1, nextval('llmtasks_config_version'), 0)
    ON CONFLICT (id) DO UPDATE SET version = excluded.version;
    RETURN NULL;
END $$;

CREATE FUNCTION llmtasks_attempt_is_settled() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'attempt % is settled: it can''t be changed or deleted', OLD.id
        USING ERRCODE = 'integrity_constraint_violation',
              HINT = 'Write an adjustment instead.';
END $$;

CREATE TRIGGER attempt_immutable BEFORE UPDATE OR DELETE ON llmtasks_attempt
    FOR EACH ROW WHEN (OLD.state = 'settled')
    EXECUTE FUNCTION llmtasks_attempt_is_settled();

INSERT INTO llmtasks_config (id, version, epoch) VALUES (1, 1, 0);
"""

TRIGGERS = "".join(
    f"""
CREATE TRIGGER raise_version AFTER INSERT OR DELETE OR UPDATE {"OF " + columns if columns else ""}
    ON {table} FOR EACH STATEMENT EXECUTE FUNCTION llmtasks_raise_version();
CREATE TRIGGER raise_version_truncate AFTER TRUNCATE
    ON {table} FOR EACH STATEMENT EXECUTE FUNCTION llmtasks_raise_version();
"""
    for table, columns in WATCHED.items()
)

REVERSE = "".join(
    f"""
DROP TRIGGER raise_version ON {table};
DROP TRIGGER raise_version_truncate ON {table};
"""
    for table in WATCHED
) + """
DROP TRIGGER attempt_immutable ON llmtasks_attempt;
DROP FUNCTION llmtasks_attempt_is_settled;
DROP FUNCTION llmtasks_raise_version;
DROP SEQUENCE llmtasks_config_version;
DELETE FROM llmtasks_config;
"""


class Migration(migrations.Migration):
    dependencies = [("llmtasks", "0001_initial")]
    operations = [migrations.RunSQL(FUNCTIONS + TRIGGERS, REVERSE)]
