"""Names of devices: from the label of the token that each enrolled with if known, else a short form of the id."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

MAX_NAME = 64
MAX_BASE = 56
BATCH = 1000
UUID_PARTS = [8, 4, 4, 4, 12]
DEVICES = sa.table(
    "devices", sa.column("id"), sa.column("name"), sa.column("registered_at", sa.DateTime())
)
TOKENS = sa.table(
    "user_tokens",
    *map(sa.column, ("kind", "subject", "device_id", "created_at")),
    sa.column("used_at", sa.DateTime()),
)


def upgrade() -> None:
    """Change the schema to this revision."""
    name = sa.String(length=MAX_NAME)
    with op.batch_alter_table("devices", schema=None) as batch_op:
        batch_op.add_column(sa.Column("name", name, nullable=True))
    _name_devices(op.get_bind())
    with op.batch_alter_table("devices", schema=None) as batch_op:
        batch_op.alter_column("name", existing_type=name, nullable=False)
        batch_op.create_unique_constraint(batch_op.f("uq_devices_name"), ["name"])


def downgrade() -> None:
    """Change the schema back to the revision before."""
    with op.batch_alter_table("devices", schema=None) as batch_op:
        batch_op.drop_constraint(batch_op.f("uq_devices_name"), type_="unique")
        batch_op.drop_column("name")


def _name_devices(connection: sa.Connection) -> None:
    labels = _labels(connection)
    taken: set[str] = set()
    tried: dict[str, int] = {}
    query = sa.select(DEVICES.c.id).order_by(DEVICES.c.registered_at, DEVICES.c.id)
    ids = list(connection.scalars(query))
    change = (
        sa.update(DEVICES)
        .where(DEVICES.c.id == sa.bindparam("device"))
        .values(name=sa.bindparam("new_name"))
    )
    for start in range(0, len(ids), BATCH):
        rows = [
            {"device": item, "new_name": _name(item, labels.get(item, ""), taken, tried)}
            for item in ids[start : start + BATCH]
        ]
        connection.execute(change, rows)


def _labels(connection: sa.Connection) -> dict[str, str]:
    """Return the label of the first token that each device used; later ones replaced its keys."""
    query = (
        sa.select(TOKENS.c.device_id, TOKENS.c.subject)
        .where(
            TOKENS.c.kind == "enrollment",
            TOKENS.c.device_id.is_not(None),
            TOKENS.c.used_at.is_not(None),
        )
        .order_by(TOKENS.c.used_at.desc())
    )
    return {row[0]: row[1] for row in connection.execute(query)}


def _name(device_id: str, label: str, taken: set[str], tried: dict[str, int]) -> str:
    wanted = _word(label) or _word(device_id) or device_id[:8]
    name = wanted
    while name in taken:
        tried[wanted] = tried.get(wanted, 1) + 1
        name = f"{wanted}-{tried[wanted]}"
    taken.add(name)
    return name


def _word(text: str) -> str:
    """Return a text as one printable word, empty if nothing of it can be kept or it is a UUID."""
    printable = "".join(letter if letter.isprintable() else " " for letter in text)
    word = "-".join(printable.split()).strip("-")[:MAX_BASE]
    is_uuid = [len(part) for part in word.split("-")] == UUID_PARTS
    return "" if is_uuid else word
