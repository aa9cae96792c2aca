"""Where each update comes from, and how many updates of a version are in-process."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

UPDATES = sa.table("model_updates", sa.column("training_session_id"), sa.column("origin"))
IN_PROCESS = UPDATES.c.training_session_id.like("in-process-%")


def upgrade() -> None:
    """Change the schema to this revision."""
    with op.batch_alter_table("model_updates", schema=None) as batch_op:
        batch_op.add_column(sa.Column("origin", sa.String(length=16), nullable=True))
    op.execute(sa.update(UPDATES).values(origin="device"))
    op.execute(sa.update(UPDATES).where(IN_PROCESS).values(origin="in_process"))
    with op.batch_alter_table("model_updates", schema=None) as batch_op:
        batch_op.alter_column("origin", existing_type=sa.String(length=16), nullable=False)
        batch_op.create_check_constraint(
            batch_op.f("ck_model_updates_origin"), "origin IN ('device', 'in_process')"
        )
    with op.batch_alter_table("global_models", schema=None) as batch_op:
        batch_op.add_column(sa.Column("in_process_count", sa.Integer(), nullable=True))


def downgrade() -> None:
    """Change the schema back to the revision before."""
    with op.batch_alter_table("global_models", schema=None) as batch_op:
        batch_op.drop_column("in_process_count")
    with op.batch_alter_table("model_updates", schema=None) as batch_op:
        batch_op.drop_constraint(batch_op.f("ck_model_updates_origin"), type_="check")
        batch_op.drop_column("origin")
