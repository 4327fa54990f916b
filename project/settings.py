"""Every setting, from the environment. `docs/settings.md` lists them; a test keeps it complete."""

from pathlib import Path
from typing import Any

from django.core.exceptions import ImproperlyConfigured
from django.templatetags.static import static
from psycopg import ProgrammingError
from psycopg.conninfo import conninfo_to_dict

from llmtasks.stores import TimedConnection
from project import env

BASE_DIR = Path(__file__).resolve().parent.parent

DEBUG = env.boolean("DEBUG", False, "Django's debug pages; never on a reachable machine")
SECRET_KEY = env.text(
    "SECRET_KEY", "", "Signs sessions and task tokens; required, 50 random characters"
)
if not SECRET_KEY:
    raise ImproperlyConfigured("SECRET_KEY is not set: give 50 random characters")
ALLOWED_HOSTS = env.csv(
    "ALLOWED_HOSTS", "127.0.0.1,localhost,[::1]", "Host names under which the server answers"
)
CSRF_TRUSTED_ORIGINS = env.csv(
    "CSRF_TRUSTED_ORIGINS", "", "Origins (https://…) from which the admin's forms may be sent"
)
CORS_ALLOWED_ORIGINS = env.csv(
    "CORS_ALLOWED_ORIGINS", "", "Origins (https://…) whose browsers may call the API"
)
CORS_URLS_REGEX = r"^/v1/"
CORS_ALLOW_HEADERS = (
    *("accept", "authorization", "cache-control", "content-type", "last-event-id"),
    *("idempotency-key", "prefer", "x-api-key", "x-request-id"),
)
CORS_EXPOSE_HEADERS = (
    *("idempotent-replayed", "location", "preference-applied", "retry-after", "x-request-id"),
    *("x-llmtasks-cost", "x-llmtasks-provider", "x-llmtasks-task-id", "x-llmtasks-warning"),
)
BEHIND_TLS_PROXY = env.boolean(
    "BEHIND_TLS_PROXY", False, "Trust X-Forwarded-Proto and send cookies over HTTPS only"
)
if BEHIND_TLS_PROXY:
    SECURE_PROXY_SSL_HEADER = ("HTTP_X_FORWARDED_PROTO", "https")
    SESSION_COOKIE_SECURE = True
    CSRF_COOKIE_SECURE = True

INSTALLED_APPS = [
    "unfold",
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "django.contrib.messages",
    "django.contrib.staticfiles",
    "corsheaders",
    "rest_framework",
    "drf_spectacular",
    "drf_spectacular_sidecar",
    "llmtasks",
    *env.csv("APPS", "", "Django apps of your own, whose `tools.py` holds tools"),
]

MIDDLEWARE = [
    "llmtasks.telemetry.request_id",
    "django.middleware.security.SecurityMiddleware",
    "whitenoise.middleware.WhiteNoiseMiddleware",
    "corsheaders.middleware.CorsMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
]

ROOT_URLCONF = "project.urls"
# Where the login page was asked for by itself.
LOGIN_REDIRECT_URL = "admin:index"
WSGI_APPLICATION = "project.wsgi.application"
APPEND_SLASH = False

TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "DIRS": [],
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ],
        },
    },
]

# --- Postgres -------------------------------------------------------------------------------

DATABASE_URL = env.text(
    "DATABASE_URL", "", "postgresql://user:password@host:5432/name; `make up` starts one if unset"
)
DB_POOL_SIZE = env.integer(
    "DB_POOL_SIZE", 12, "Postgres connections a process holds at the most", least=2
)


def database(url: str) -> dict[str, Any]:
    """Django's entry for a PostgreSQL URL; unknown query parameters go to libpq."""
    try:
        parts: dict[str, Any] = dict(conninfo_to_dict(url))
    except ProgrammingError as error:
        raise ImproperlyConfigured(f"DATABASE_URL can't be read: {str(error).strip()}") from None
    return {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": parts.pop("dbname", "postgres"),
        "USER": parts.pop("user", ""),
        "PASSWORD": parts.pop("password", ""),
        "HOST": parts.pop("host", ""),
        "PORT": parts.pop("port", ""),
        "CONN_HEALTH_CHECKS": True,
        "OPTIONS": {
            "connect_timeout": 3,
            "tcp_user_timeout": 10_000,
            # Django turns prepared statements off; so high, only those are that ask for it.
            "prepare_threshold": 1_000_000_000,
            "keepalives_idle": 10,
            "options": "-c statement_timeout=30s -c lock_timeout=10s"
            " -c idle_in_transaction_session_timeout=60s",
            "pool": {
                "connection_class": TimedConnection,
                "min_size": 1,
                "max_size": DB_POOL_SIZE,
                # How long a thread waits for a connection: Postgres away is told within it.
                "timeout": 3.0,
                "max_idle": 60.0,
                "reconnect_timeout": 5.0,
            },
            **parts,
        },
    }


DATABASES = {"default": database(DATABASE_URL)}
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"

# --- Redis and Celery -----------------------------------------------------------------------

REDIS_URL = env.text(
    "REDIS_URL",
    "redis://127.0.0.1:6379/0",
    "Redis or Valkey: broker, wake-ups and live events; `make up` starts one if unset",
)

CELERY_BROKER_URL = REDIS_URL
CELERY_BROKER_CONNECTION_RETRY_ON_STARTUP = True
CELERY_BROKER_CONNECTION_MAX_RETRIES = None
CELERY_BROKER_TRANSPORT_OPTIONS = {
    "socket_timeout": 5.0,
    "socket_connect_timeout": 2.0,
    "retry_on_timeout": True,
    # A message only names a row, and the sweep sends lost ones again: kombu need not keep an
    # index of those that are not acknowledged, two round trips each.
    "ack_emulation": False,
}
CELERY_TASK_IGNORE_RESULT = True
CELERY_TASK_ACKS_LATE = False
CELERY_WORKER_PREFETCH_MULTIPLIER = 1
CELERY_WORKER_DISABLE_PREFETCH = True
CELERY_WORKER_SEND_TASK_EVENTS = True
CELERY_WORKER_HIJACK_ROOT_LOGGER = False
CELERY_TASK_DEFAULT_QUEUE = "maintenance"
CELERY_TIMEZONE = "UTC"
CELERY_BEAT_SCHEDULE = {
    "purge": {"task": "maintenance.purge", "schedule": 600.0, "options": {"expires": 500.0}},
    "discover": {
        "task": "maintenance.discover",
        "schedule": env.seconds(
            "MCP_LOOK_S", 600, "How often MCP servers are asked what they offer", least=10
        ),
        "options": {"expires": 60.0},
    },
}

# --- The backend ----------------------------------------------------------------------------

LLMTASKS = {
    "INLINE_DEADLINE_S": env.seconds(
        "INLINE_DEADLINE_S", 600, "Deadline of inline work that names none, in seconds", least=0.1
    ),
    "QUEUED_DEADLINE_S": env.seconds(
        "QUEUED_DEADLINE_S", 86_400, "Deadline of queued work that names none", least=1
    ),
    "AUTO_WAIT_S": env.seconds(
        "AUTO_WAIT_S", 10, "How long the caller of work in mode `auto` waits, inline or watching"
    ),
    "MAX_WAIT_S": env.seconds("MAX_WAIT_S", 60, "The longest `Prefer: wait=N` that is honoured"),
    "MAX_BODY_BYTES": env.integer(
        "MAX_BODY_BYTES", 20_000_000, "The largest request body that is read", least=1000
    ),
    "PAYLOAD_DAYS": env.integer(
        "PAYLOAD_DAYS", 30, "Days after which prompts and answers are deleted (bills stay)", least=1
    ),
    "IDEMPOTENCY_HOURS": env.integer(
        "IDEMPOTENCY_HOURS", 24, "Hours for which an Idempotency-Key is remembered", least=1
    ),
    "TASK_TOKEN_S": env.seconds(
        "TASK_TOKEN_S", 900, "Life of a browser's task token, in seconds", least=1
    ),
    "WATCHERS": env.integer(
        "WATCHERS", 64, "Event streams that one web process serves at a time", least=1
    ),
    "STREAM_S": env.seconds(
        "STREAM_S", 60, "After how long an event stream ends (the browser resumes)", least=1
    ),
    "EVENTS_KEPT": env.integer(
        "EVENTS_KEPT", 1000, "Events kept in Redis for one task, the oldest dropped", least=10
    ),
    "EVENTS_TTL_S": env.integer(
        "EVENTS_TTL_S",
        3600,
        "Seconds for which an unfinished task's events stay in Redis",
        least=10,
    ),
    "WORKER_CONCURRENCY": env.integer(
        "WORKER_CONCURRENCY", 64, "Tasks that one worker process runs at a time", least=1
    ),
    "PROVIDER_SHARE": env.number(
        "PROVIDER_SHARE",
        0.75,
        "Share of a lane's slots that one provider may hold (0 to 1)",
        least=0.01,
        most=1.0,
        kind=float,
    ),
    "INTERACTIVE_RESERVE": env.number(
        "INTERACTIVE_RESERVE",
        0.5,
        "Share of each limit's burst that background lanes leave to whoever waits (0 to 0.9)",
        least=0.0,
        most=0.9,
        kind=float,
    ),
    "LEASE_S": env.seconds(
        "LEASE_S", 30, "Seconds after which a process without a sign of life loses its tasks"
    ),
    "RENEW_S": env.seconds(
        "RENEW_S", 5, "How often a process renews its lease, in seconds", least=0.1
    ),
    "DROP_AFTER_S": env.seconds(
        "DROP_AFTER_S", 25, "Without a renewal for so long a process drops its own calls"
    ),
    "GRACE_S": env.integer(
        "GRACE_S", 20, "Seconds that calls under way get when their process is to end", least=1
    ),
    "HINT_LOST_S": env.seconds(
        "HINT_LOST_S",
        30,
        "When a released task counts as lost if its hint lies in no queue",
        least=1,
    ),
}
PRIVATE_NETWORKS = env.networks(
    "PRIVATE_NETWORKS",
    "",
    "Networks that tools, MCP servers and webhooks may reach beside the public Internet",
)
CLIENT_LEFT = env.choice(
    "CLIENT_LEFT",
    "drop",
    "What becomes of an inline call whose caller hung up: `drop` or `drain`",
    among=("drop", "drain"),
)
if not LLMTASKS["RENEW_S"] < LLMTASKS["DROP_AFTER_S"] < LLMTASKS["LEASE_S"]:
    raise ImproperlyConfigured(
        "RENEW_S, DROP_AFTER_S and LEASE_S must grow in that order: a process has to drop its"
        " calls before its lease runs out"
    )

# --- Web ------------------------------------------------------------------------------------

DATA_UPLOAD_MAX_MEMORY_SIZE = LLMTASKS["MAX_BODY_BYTES"]
STATIC_URL = "/static/"
STATIC_ROOT = BASE_DIR / "staticfiles"
STORAGES = {
    "default": {"BACKEND": "django.core.files.storage.FileSystemStorage"},
    "staticfiles": {"BACKEND": "whitenoise.storage.CompressedStaticFilesStorage"},
}
USE_TZ = True
TIME_ZONE = "UTC"
LANGUAGE_CODE = "en"
USE_I18N = False

REST_FRAMEWORK = {
    "DEFAULT_AUTHENTICATION_CLASSES": ["llmtasks.api.auth.ApiKeyAuthentication"],
    "DEFAULT_PERMISSION_CLASSES": ["rest_framework.permissions.IsAuthenticated"],
    "DEFAULT_RENDERER_CLASSES": ["rest_framework.renderers.JSONRenderer"],
    "DEFAULT_PARSER_CLASSES": ["rest_framework.parsers.JSONParser"],
    "DEFAULT_SCHEMA_CLASS": "drf_spectacular.openapi.AutoSchema",
    "EXCEPTION_HANDLER": "llmtasks.api.errors.handle",
    "UNAUTHENTICATED_USER": None,
}

SPECTACULAR_SETTINGS = {
    "TITLE": "llmtasks",
    "DESCRIPTION": "A self-hosted LLM task backend.",
    "VERSION": "1",
    "OAS_VERSION": "3.1.0",
    "SERVE_INCLUDE_SCHEMA": False,
    "SWAGGER_UI_DIST": "SIDECAR",
    "SWAGGER_UI_FAVICON_HREF": "SIDECAR",
    "REDOC_DIST": "SIDECAR",
}

# --- The admin ------------------------------------------------------------------------------

FLOWER_URL = env.text("FLOWER_URL", "", "Where Flower is, for the admin's link to it")
UNFOLD = {
    "SITE_TITLE": "llmtasks",
    "SITE_HEADER": "llmtasks",
    "SITE_SUBHEADER": "LLM task backend",
    "SITE_SYMBOL": "hub",
    "STYLES": [lambda request: static("llmtasks/admin.css")],
    "SIDEBAR": {"navigation": "llmtasks.admin.navigation.navigation"},
    "DASHBOARD_CALLBACK": "llmtasks.admin.start.context",
}

METRICS_TOKEN = env.text(
    "METRICS_TOKEN", "", "Who reads /metrics sends it as a Bearer token; unset: this machine only"
)
if METRICS_TOKEN and len(METRICS_TOKEN) < 16:
    raise ImproperlyConfigured("METRICS_TOKEN is too short: give 16 random characters or more")

LOG_LEVEL = env.text("LOG_LEVEL", "INFO", "DEBUG, INFO, WARNING or ERROR")
LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"json": {"()": "llmtasks.telemetry.JsonFormatter"}},
    "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "json"}},
    "root": {"handlers": ["stderr"], "level": LOG_LEVEL},
    "loggers": {
        # Answers with a 4xx are told to the caller; they are no news for an operator.
        "django.request": {"level": "ERROR"},
        "celery": {"level": "WARNING"},
        "kombu": {"level": "WARNING"},
        # What a server makes of its client is told as the result of the call.
        "mcp": {"level": "CRITICAL"},
        "client": {"level": "CRITICAL"},
        "httpx2": {"level": "WARNING"},
    },
}
