"""The version of an update is that of its round; a round says when its updates were pruned."""

import sqlalchemy as sa
from alembic import op

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None

UNPRUNED = sa.text("pruned_at IS NULL")


def upgrade() -> None:
    """Change the schema to this revision."""
    op.drop_index("ix_model_updates_lineage", table_name="model_updates")
    op.drop_column("model_updates", "aggregated_version")
    op.add_column("rounds", sa.Column("pruned_at", sa.DateTime(timezone=True), nullable=True))
    op.create_index(
        "ix_rounds_unpruned",
        "rounds",
        ["training_session_id", "number"],
        sqlite_where=UNPRUNED,
        postgresql_where=UNPRUNED,
    )


def downgrade() -> None:
    """Change the schema back to the revision before."""
    op.drop_index("ix_rounds_unpruned", table_name="rounds")
    op.drop_column("rounds", "pruned_at")
    op.add_column("model_updates", sa.Column("aggregated_version", sa.Integer(), nullable=True))
    op.execute(
        "UPDATE model_updates SET state = 'aggregated', aggregated_version = rounds.version,"
        " aggregated_at = rounds.published_at FROM rounds"
        " WHERE rounds.training_session_id = model_updates.training_session_id"
        " AND rounds.number = model_updates.round_number"
        " AND rounds.version IS NOT NULL AND model_updates.state <> 'rejected'"
    )
    op.create_index(
        "ix_model_updates_lineage",
        "model_updates",
        ["training_session_id", "aggregated_version", "acceptance_sequence"],
    )
