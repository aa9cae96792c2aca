"""Failures that devices report of their work on a round."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Change the schema to this revision."""
    op.create_table(
        "device_failures",
        sa.Column("training_session_id", sa.String(length=36), nullable=False),
        sa.Column("round_number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("device_id", sa.String(length=255), nullable=False),
        sa.Column("kind", sa.String(length=64), nullable=False),
        sa.Column("text", sa.String(length=200), nullable=False),
        sa.Column("report_count", sa.Integer(), nullable=False),
        sa.Column("reported_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["device_id"], ["devices.id"], name=op.f("fk_device_failures_device_id")
        ),
        sa.ForeignKeyConstraint(
            ["training_session_id", "round_number"],
            ["rounds.training_session_id", "rounds.number"],
            name=op.f("fk_device_failures_training_session_id_round_number"),
        ),
        sa.PrimaryKeyConstraint(
            "training_session_id", "round_number", "device_id", name=op.f("pk_device_failures")
        ),
    )


def downgrade() -> None:
    """Change the schema back to the revision before."""
    op.drop_table("device_failures")
