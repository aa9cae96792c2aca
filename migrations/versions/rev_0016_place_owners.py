"""Owners of the folders and buckets of payload stores."""

import sqlalchemy as sa
from alembic import op

revision = "0016"
down_revision = "0015"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Change the schema to this revision; a folder or bucket has no owner until a coordinator has run for a while."""
    op.add_column("payload_places", sa.Column("owner", sa.String(length=32), nullable=True))
    op.add_column("payload_places", sa.Column("next_owner", sa.String(length=32), nullable=True))


def downgrade() -> None:
    """Change the schema back to the revision before."""
    op.drop_column("payload_places", "next_owner")
    op.drop_column("payload_places", "owner")
