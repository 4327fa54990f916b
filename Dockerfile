# One image for every program; docker-compose.yml says what each container runs.
FROM python:3.13-slim

ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
RUN useradd --system --uid 10001 --create-home llmtasks
WORKDIR /app

COPY requirements.lock ./
RUN pip install --no-cache-dir --disable-pip-version-check \
    --require-hashes --only-binary :all: -r requirements.lock

COPY manage.py ./
COPY project project
COPY providers providers
COPY llmtasks llmtasks
RUN python -m compileall -q . && SECRET_KEY=build python manage.py collectstatic --noinput --verbosity 0

USER llmtasks
EXPOSE 8000
CMD ["python", "-m", "gunicorn", "project.wsgi:application", "--config=python:project.gunicorn", "--bind=0.0.0.0:8000", "--worker-class=gthread", "--workers=2", "--threads=128", "--no-control-socket"]
