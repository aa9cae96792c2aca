"""Passes over the updates of a round that several coordinators do slice by slice."""

import sqlalchemy as sa
from alembic import op

revision = "0018"
down_revision = "0017"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Change the schema to this revision."""
    op.create_table(
        "fold_passes",
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column("training_session_id", sa.String(length=36), nullable=False),
        sa.Column("round_number", sa.Integer(), nullable=False),
        sa.Column("leader", sa.String(length=64), nullable=False),
        sa.Column("name", sa.String(length=16), nullable=False),
        sa.Column("format", sa.Integer(), nullable=False),
        sa.Column("inputs", sa.LargeBinary(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["training_session_id", "round_number"],
            ["rounds.training_session_id", "rounds.number"],
            name="fk_fold_passes_training_session_id_round_number",
        ),
        sa.PrimaryKeyConstraint("id", name="pk_fold_passes"),
    )
    op.create_index(
        "ix_fold_passes_training_session_id_round_number",
        "fold_passes",
        ["training_session_id", "round_number"],
    )
    op.create_table(
        "fold_slices",
        sa.Column("pass_id", sa.String(length=32), nullable=False),
        sa.Column("slice_index", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("first_element", sa.BigInteger(), nullable=False),
        sa.Column("end_element", sa.BigInteger(), nullable=False),
        sa.Column("holder", sa.String(length=64), nullable=False),
        sa.Column("fence", sa.BigInteger(), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("payload_id", sa.String(length=32), nullable=True),
        sa.Column("authenticator", sa.LargeBinary(), nullable=True),
        sa.ForeignKeyConstraint(["pass_id"], ["fold_passes.id"], name="fk_fold_slices_pass_id"),
        sa.ForeignKeyConstraint(["payload_id"], ["payloads.id"], name="fk_fold_slices_payload_id"),
        sa.PrimaryKeyConstraint("pass_id", "slice_index", name="pk_fold_slices"),
    )


def downgrade() -> None:
    """Change the schema back to the revision before; results that were not used are left to the orphan sweep."""
    op.drop_table("fold_slices")
    op.drop_index("ix_fold_passes_training_session_id_round_number", table_name="fold_passes")
    op.drop_table("fold_passes")
