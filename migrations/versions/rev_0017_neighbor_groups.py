"""Groups and members of secure aggregation with neighbors."""

import sqlalchemy as sa
from alembic import op

revision = "0017"
down_revision = "0016"
branch_labels = None
depends_on = None

_STAGES = "'share', 'train', 'confirm', 'reveal', 'opened', 'aborted'"


def upgrade() -> None:
    """Change the schema to this revision."""
    op.create_table(
        "neighbor_groups",
        sa.Column("training_session_id", sa.String(length=36), nullable=False),
        sa.Column("round_number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("stage", sa.String(length=16), nullable=False),
        sa.Column("stage_reason", sa.String(length=500), nullable=False),
        sa.Column("roster_digest", sa.String(length=64), nullable=False),
        sa.Column("sharers_digest", sa.String(length=64), nullable=True),
        sa.Column("survivors_digest", sa.String(length=64), nullable=True),
        sa.Column("deadline_at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint(f"stage IN ({_STAGES})", name=op.f("ck_neighbor_groups_stage")),
        sa.CheckConstraint("number > 0", name=op.f("ck_neighbor_groups_number")),
        sa.ForeignKeyConstraint(
            ["training_session_id", "round_number"],
            ["rounds.training_session_id", "rounds.number"],
            name=op.f("fk_neighbor_groups_training_session_id_round_number"),
        ),
        sa.PrimaryKeyConstraint(
            "training_session_id", "round_number", "number", name=op.f("pk_neighbor_groups")
        ),
    )
    op.create_table(
        "neighbor_members",
        sa.Column("training_session_id", sa.String(length=36), nullable=False),
        sa.Column("round_number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("device_id", sa.String(length=255), nullable=False),
        sa.Column("advertisement_digest", sa.String(length=64), nullable=False),
        sa.Column("group_number", sa.Integer(), nullable=True),
        sa.Column("is_sharer", sa.Boolean(), nullable=False),
        sa.Column("update_digest", sa.String(length=64), nullable=True),
        sa.Column("shares_digest", sa.String(length=64), nullable=True),
        sa.Column("advertisement", sa.LargeBinary(), nullable=True),
        sa.Column("shares", sa.LargeBinary(), nullable=True),
        sa.Column("confirmation", sa.LargeBinary(), nullable=True),
        sa.Column("reveal", sa.LargeBinary(), nullable=True),
        sa.Column("transcript", sa.LargeBinary(), nullable=True),
        sa.ForeignKeyConstraint(
            ["device_id"], ["devices.id"], name=op.f("fk_neighbor_members_device_id")
        ),
        sa.ForeignKeyConstraint(
            ["training_session_id", "round_number"],
            ["rounds.training_session_id", "rounds.number"],
            name=op.f("fk_neighbor_members_training_session_id_round_number"),
        ),
        sa.PrimaryKeyConstraint(
            "training_session_id", "round_number", "device_id", name=op.f("pk_neighbor_members")
        ),
        sa.UniqueConstraint(
            "advertisement_digest", name=op.f("uq_neighbor_members_advertisement_digest")
        ),
    )
    op.create_index(op.f("ix_neighbor_members_device_id"), "neighbor_members", ["device_id"])


def downgrade() -> None:
    """Change the schema back to the revision before."""
    op.drop_index(op.f("ix_neighbor_members_device_id"), table_name="neighbor_members")
    op.drop_table("neighbor_members")
    op.drop_table("neighbor_groups")
