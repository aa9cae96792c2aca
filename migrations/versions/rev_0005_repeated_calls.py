"""Repeated calls by actor, and room for the longest actor and subject of an audit entry."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Change the schema to this revision."""
    op.drop_table("idempotent_calls")  # nothing has written to it
    op.create_table(
        "idempotent_calls",
        sa.Column("actor", sa.String(length=300), nullable=False),
        sa.Column("method", sa.String(length=64), nullable=False),
        sa.Column("request_id", sa.String(length=100), nullable=False),
        sa.Column("request_digest", sa.String(length=64), nullable=False),
        sa.Column("response", sa.LargeBinary(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("actor", "method", "request_id", name=op.f("pk_idempotent_calls")),
    )
    _index_calls()
    with op.batch_alter_table("audit_log", schema=None) as batch_op:
        for name in ("actor", "subject"):
            batch_op.alter_column(
                name,
                existing_type=sa.String(length=255),
                type_=sa.String(length=300),
                existing_nullable=False,
            )


def _index_calls() -> None:
    with op.batch_alter_table("idempotent_calls", schema=None) as batch_op:
        batch_op.create_index(
            batch_op.f("ix_idempotent_calls_created_at"), ["created_at"], unique=False
        )


def downgrade() -> None:
    """Change the schema back to the revision before; fails where an actor or subject has over 255 characters."""
    with op.batch_alter_table("audit_log", schema=None) as batch_op:
        for name in ("actor", "subject"):
            batch_op.alter_column(
                name,
                existing_type=sa.String(length=300),
                type_=sa.String(length=255),
                existing_nullable=False,
            )
    op.drop_table("idempotent_calls")
    op.create_table(
        "idempotent_calls",
        sa.Column("request_id", sa.String(length=100), nullable=False),
        sa.Column("method", sa.String(length=200), nullable=False),
        sa.Column("request_digest", sa.String(length=64), nullable=False),
        sa.Column("response", sa.LargeBinary(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("request_id", "method", name=op.f("pk_idempotent_calls")),
    )
    _index_calls()
