"""Rounds count the devices that reported a failure."""

import sqlalchemy as sa
from alembic import op

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None

COUNTED = """
UPDATE rounds SET failed_count = (
    SELECT count(*) FROM device_failures
    WHERE device_failures.training_session_id = rounds.training_session_id
    AND device_failures.round_number = rounds.number
)
"""


def upgrade() -> None:
    """Change the schema to this revision."""
    with op.batch_alter_table("rounds", schema=None) as batch_op:
        batch_op.add_column(
            sa.Column("failed_count", sa.Integer(), nullable=False, server_default="0")
        )
    op.execute(COUNTED)
    with op.batch_alter_table("rounds", schema=None) as batch_op:
        batch_op.alter_column("failed_count", server_default=None)


def downgrade() -> None:
    """Change the schema back to the revision before."""
    with op.batch_alter_table("rounds", schema=None) as batch_op:
        batch_op.drop_column("failed_count")
