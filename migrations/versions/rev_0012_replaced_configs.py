"""Configurations of training sessions that an administrator replaced by changing the rule of their rounds."""

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Change the schema to this revision."""
    op.create_table(
        "replaced_configs",
        sa.Column("training_session_id", sa.String(length=36), nullable=False),
        sa.Column("sequence", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("config", sa.JSON(), nullable=False),
        sa.Column("last_round", sa.Integer(), nullable=False),
        sa.Column("replaced_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["training_session_id"],
            ["training_sessions.id"],
            name=op.f("fk_replaced_configs_training_session_id"),
        ),
        sa.PrimaryKeyConstraint(
            "training_session_id", "sequence", name=op.f("pk_replaced_configs")
        ),
    )


def downgrade() -> None:
    """Change the schema back to the revision before."""
    op.drop_table("replaced_configs")
