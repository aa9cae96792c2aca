"""Signed statements of evaluations. Earlier evaluations have no statement and are ignored."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Upgrade the schema to this revision."""
    with op.batch_alter_table("evaluations", schema=None) as batch_op:
        batch_op.add_column(sa.Column("statement", sa.LargeBinary(), nullable=True))
        batch_op.add_column(sa.Column("statement_digest", sa.String(length=64), nullable=True))
        batch_op.add_column(sa.Column("signature", sa.LargeBinary(), nullable=True))
        batch_op.add_column(sa.Column("key_id", sa.String(length=64), nullable=True))
        batch_op.add_column(sa.Column("weight", sa.BigInteger(), nullable=True))
        batch_op.create_unique_constraint(
            batch_op.f("uq_evaluations_statement_digest"), ["statement_digest"]
        )


def downgrade() -> None:
    """Downgrade the schema to the previous revision."""
    with op.batch_alter_table("evaluations", schema=None) as batch_op:
        batch_op.drop_constraint(batch_op.f("uq_evaluations_statement_digest"), type_="unique")
        batch_op.drop_column("weight")
        batch_op.drop_column("key_id")
        batch_op.drop_column("signature")
        batch_op.drop_column("statement_digest")
        batch_op.drop_column("statement")
