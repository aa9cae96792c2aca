"""Payload stores: the row of a payload names the store of its chunks."""

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Change the schema to this revision; existing chunks are in the store `database`."""
    op.add_column("payloads", sa.Column("store", sa.String(length=8), nullable=True))
    op.add_column("payloads", sa.Column("chunks_id", sa.String(length=32), nullable=True))
    op.execute("UPDATE payloads SET store = 'database', chunks_id = id WHERE location = 'store'")
    op.add_column("uploads", sa.Column("store", sa.String(length=8), nullable=True))
    op.execute("UPDATE uploads SET store = 'database'")
    with op.batch_alter_table("uploads") as batch:
        batch.alter_column("store", existing_type=sa.String(length=8), nullable=False)
    op.create_table(
        "payload_places",
        sa.Column("store", sa.String(length=8), nullable=False),
        sa.Column("identity", sa.String(length=32), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("store", name=op.f("pk_payload_places")),
    )
    op.execute("DELETE FROM replicas")  # they announce themselves again
    op.add_column("replicas", sa.Column("payload_store", sa.String(length=32), nullable=True))
    with op.batch_alter_table("replicas") as batch:
        batch.alter_column("payload_store", existing_type=sa.String(length=32), nullable=False)


def downgrade() -> None:
    """Change the schema back to the revision before; chunks in other stores become unreachable."""
    op.drop_column("replicas", "payload_store")
    op.drop_table("payload_places")
    with op.batch_alter_table("uploads") as batch:
        batch.drop_column("store")
    op.drop_column("payloads", "chunks_id")
    op.drop_column("payloads", "store")
