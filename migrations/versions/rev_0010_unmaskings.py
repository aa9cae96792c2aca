"""Answers of helpers for secure aggregation."""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Change the schema to this revision."""
    op.create_table(
        "unmaskings",
        sa.Column("training_session_id", sa.String(length=36), nullable=False),
        sa.Column("round_number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("position", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("helper_id", sa.String(length=64), nullable=False),
        sa.Column("counter", sa.BigInteger(), nullable=False),
        sa.Column("answer", sa.LargeBinary(), nullable=False),
        sa.Column("payload_id", sa.String(length=32), nullable=False),
        sa.Column("refused", sa.JSON(), nullable=False),
        sa.CheckConstraint("counter > 0", name=op.f("ck_unmaskings_counter")),
        sa.ForeignKeyConstraint(
            ["payload_id"], ["payloads.id"], name=op.f("fk_unmaskings_payload_id")
        ),
        sa.ForeignKeyConstraint(
            ["training_session_id", "round_number"],
            ["rounds.training_session_id", "rounds.number"],
            name=op.f("fk_unmaskings_training_session_id_round_number"),
        ),
        sa.PrimaryKeyConstraint(
            "training_session_id", "round_number", "position", name=op.f("pk_unmaskings")
        ),
        sa.UniqueConstraint("helper_id", "counter", name=op.f("uq_unmaskings_helper_id_counter")),
    )
    op.create_index(op.f("ix_unmaskings_payload_id"), "unmaskings", ["payload_id"])


def downgrade() -> None:
    """Change the schema back to the revision before."""
    op.drop_index(op.f("ix_unmaskings_payload_id"), table_name="unmaskings")
    op.drop_table("unmaskings")
