"""Best version by the objective; held-out metrics take precedence in training sessions with evaluation."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

SESSIONS = sa.table(
    "training_sessions",
    sa.column("id", sa.String()),
    sa.column("config", sa.JSON()),
    sa.column("best_value", sa.Double()),
    sa.column("best_version", sa.Integer()),
)
MODELS = sa.table(
    "global_models",
    sa.column("training_session_id", sa.String()),
    sa.column("version", sa.Integer()),
    sa.column("metrics", sa.JSON()),
)


def upgrade() -> None:
    """Upgrade the schema to this revision, and recompute the best version of every training session."""
    with op.batch_alter_table("training_sessions", schema=None) as batch_op:
        batch_op.alter_column("best_accuracy", new_column_name="best_value")
    connection = op.get_bind()
    for training_session_id, config in connection.execute(
        sa.select(SESSIONS.c.id, SESSIONS.c.config)
    ).all():
        version, value = _best(connection, training_session_id, config)
        connection.execute(
            sa.update(SESSIONS)
            .where(SESSIONS.c.id == training_session_id)
            .values(best_value=value, best_version=version)
        )


def _best(
    connection: sa.Connection, training_session_id: str, config: dict[str, dict[str, str]]
) -> tuple[int | None, float | None]:
    stop = config.get("early_stop", {})
    metric = stop.get("metric") or "accuracy"
    evaluates = config.get("evaluation", {}).get("every_rounds")
    key = metric if evaluates else f"train_{metric}"
    sign = -1.0 if stop.get("minimize") else 1.0
    rows = connection.execute(
        sa.select(MODELS.c.version, MODELS.c.metrics)
        .where(MODELS.c.training_session_id == training_session_id)
        .order_by(MODELS.c.version)
    )
    found = [(version, metrics[key]) for version, metrics in rows if key in metrics]
    return max(found, key=lambda item: sign * item[1], default=(None, None))


def downgrade() -> None:
    """Downgrade the schema to the previous revision."""
    with op.batch_alter_table("training_sessions", schema=None) as batch_op:
        batch_op.alter_column("best_value", new_column_name="best_accuracy")
