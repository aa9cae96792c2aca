"""Rounds count the devices whose updates came late."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Change the schema to this revision."""
    op.create_table(
        "late_updates",
        sa.Column("training_session_id", sa.String(length=36), nullable=False),
        sa.Column("round_number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("device_id", sa.String(length=255), nullable=False),
        sa.Column("refused_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["device_id"], ["devices.id"], name=op.f("fk_late_updates_device_id")
        ),
        sa.ForeignKeyConstraint(
            ["training_session_id", "round_number"],
            ["rounds.training_session_id", "rounds.number"],
            name=op.f("fk_late_updates_training_session_id_round_number"),
        ),
        sa.PrimaryKeyConstraint(
            "training_session_id", "round_number", "device_id", name=op.f("pk_late_updates")
        ),
    )
    with op.batch_alter_table("rounds", schema=None) as batch_op:
        batch_op.add_column(
            sa.Column("late_count", sa.Integer(), nullable=False, server_default="0")
        )
    with op.batch_alter_table("rounds", schema=None) as batch_op:
        batch_op.alter_column("late_count", server_default=None)


def downgrade() -> None:
    """Change the schema back to the revision before."""
    with op.batch_alter_table("rounds", schema=None) as batch_op:
        batch_op.drop_column("late_count")
    op.drop_table("late_updates")
