"""Payload stores: the row of a payload names the store of its chunks."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Change the schema to this revision; existing chunks are in the store `database`."""
    op.add_column("payloads", sa.Column("store", sa.String(length=8), nullable=True))
    op.execute("UPDATE payloads SET store = 'database' WHERE location = 'store'")
    with op.batch_alter_table("uploads") as batch:
        batch.add_column(
            sa.Column("store", sa.String(length=8), nullable=False, server_default="database")
        )
        batch.drop_constraint(op.f("pk_uploads"), type_="primary")
        batch.create_primary_key(op.f("pk_uploads"), ["payload_id", "store"])
    with op.batch_alter_table("uploads") as batch:
        batch.alter_column("store", server_default=None)


def downgrade() -> None:
    """Change the schema back to the revision before; chunks in other stores become unreachable."""
    with op.batch_alter_table("uploads") as batch:
        batch.drop_constraint(op.f("pk_uploads"), type_="primary")
        batch.create_primary_key(op.f("pk_uploads"), ["payload_id"])
        batch.drop_column("store")
    op.drop_column("payloads", "store")
