"""${message}."""

import sqlalchemy as sa
from alembic import op
${imports if imports else ""}

revision = ${'"' + up_revision + '"'}
down_revision = ${'"' + down_revision + '"' if down_revision else "None"}
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Upgrade the schema to this revision."""
    ${upgrades if upgrades else "pass"}


def downgrade() -> None:
    """Downgrade the schema to the previous revision."""
    ${downgrades if downgrades else "pass"}
