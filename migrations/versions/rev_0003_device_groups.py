"""Device groups, and the device profile used for selection: stated, reported and confirmed values."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Upgrade the schema to this revision."""
    op.create_table(
        "device_groups",
        sa.Column("device_id", sa.String(length=255), nullable=False),
        sa.Column("group_name", sa.String(length=63), nullable=False),
        sa.ForeignKeyConstraint(
            ["device_id"], ["devices.id"], name=op.f("fk_device_groups_device_id")
        ),
        sa.PrimaryKeyConstraint("device_id", "group_name", name=op.f("pk_device_groups")),
    )
    with op.batch_alter_table("device_groups", schema=None) as batch_op:
        batch_op.create_index(
            batch_op.f("ix_device_groups_group_name_device_id"),
            ["group_name", "device_id"],
            unique=False,
        )
    op.create_table(
        "training_session_groups",
        sa.Column("training_session_id", sa.String(length=36), nullable=False),
        sa.Column("group_name", sa.String(length=63), nullable=False),
        sa.ForeignKeyConstraint(
            ["training_session_id"],
            ["training_sessions.id"],
            name=op.f("fk_training_session_groups_training_session_id"),
        ),
        sa.PrimaryKeyConstraint(
            "training_session_id", "group_name", name=op.f("pk_training_session_groups")
        ),
    )
    with op.batch_alter_table("devices", schema=None) as batch_op:
        batch_op.add_column(sa.Column("confirmed_at", sa.DateTime(timezone=True), nullable=True))
        batch_op.add_column(sa.Column("reported_type", sa.String(length=100), nullable=True))
        batch_op.add_column(sa.Column("reported_capabilities", sa.JSON(), nullable=True))
    with op.batch_alter_table("user_tokens", schema=None) as batch_op:
        batch_op.add_column(sa.Column("device_groups", sa.JSON(), nullable=True))
    with op.batch_alter_table("round_devices", schema=None) as batch_op:
        batch_op.create_index(
            batch_op.f("ix_round_devices_device_id_training_session_id"),
            ["device_id", "training_session_id"],
            unique=False,
        )


def downgrade() -> None:
    """Downgrade the schema to the previous revision."""
    with op.batch_alter_table("round_devices", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_round_devices_device_id_training_session_id"))
    with op.batch_alter_table("user_tokens", schema=None) as batch_op:
        batch_op.drop_column("device_groups")
    with op.batch_alter_table("devices", schema=None) as batch_op:
        batch_op.drop_column("reported_capabilities")
        batch_op.drop_column("reported_type")
        batch_op.drop_column("confirmed_at")
    op.drop_table("training_session_groups")
    with op.batch_alter_table("device_groups", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_device_groups_group_name_device_id"))
    op.drop_table("device_groups")
