"""Initial schema."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Upgrade the schema to this revision."""
    op.create_table(
        "audit_heads",
        sa.Column("size", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("root", sa.LargeBinary(), nullable=False),
        sa.Column("statement", sa.LargeBinary(), nullable=False),
        sa.Column("signature", sa.LargeBinary(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("size", name=op.f("pk_audit_heads")),
    )
    op.create_table(
        "audit_log",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("leaf_index", sa.BigInteger(), nullable=True),
        sa.Column("leaf_hash", sa.LargeBinary(), nullable=True),
        sa.Column("event_type", sa.String(length=64), nullable=False),
        sa.Column("actor", sa.String(length=255), nullable=False),
        sa.Column("subject", sa.String(length=255), nullable=False),
        sa.Column("peer_address", sa.String(length=128), nullable=False),
        sa.Column("authentication_method", sa.String(length=32), nullable=False),
        sa.Column("risk_level", sa.String(length=8), nullable=False),
        sa.Column("details", sa.JSON(), nullable=False),
        sa.Column("salt", sa.LargeBinary(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint(
            "risk_level IN ('low', 'medium', 'high', 'critical')",
            name=op.f("ck_audit_log_risk_level"),
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_audit_log")),
        sa.UniqueConstraint("leaf_index", name=op.f("uq_audit_log_leaf_index")),
    )
    with op.batch_alter_table("audit_log", schema=None) as batch_op:
        batch_op.create_index(
            batch_op.f("ix_audit_log_actor_created_at_id"),
            ["actor", "created_at", "id"],
            unique=False,
        )
        batch_op.create_index(
            batch_op.f("ix_audit_log_created_at_id"), ["created_at", "id"], unique=False
        )
        batch_op.create_index(
            batch_op.f("ix_audit_log_event_type_created_at_id"),
            ["event_type", "created_at", "id"],
            unique=False,
        )
        batch_op.create_index(
            "ix_audit_log_pending",
            ["id"],
            unique=False,
            sqlite_where=sa.text("leaf_index IS NULL"),
            postgresql_where=sa.text("leaf_index IS NULL"),
        )
        batch_op.create_index(
            batch_op.f("ix_audit_log_risk_level_created_at_id"),
            ["risk_level", "created_at", "id"],
            unique=False,
        )
        batch_op.create_index(
            batch_op.f("ix_audit_log_subject_created_at_id"),
            ["subject", "created_at", "id"],
            unique=False,
        )

    op.create_table(
        "audit_nodes",
        sa.Column("level", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("node_index", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("hash", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("level", "node_index", name=op.f("pk_audit_nodes")),
    )
    op.create_table(
        "devices",
        sa.Column("id", sa.String(length=255), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("state_reason", sa.String(length=500), nullable=False),
        sa.Column("device_type", sa.String(length=100), nullable=False),
        sa.Column("hardware_info", sa.JSON(), nullable=False),
        sa.Column("network_info", sa.JSON(), nullable=False),
        sa.Column("capabilities", sa.JSON(), nullable=False),
        sa.Column("local_epochs", sa.Integer(), nullable=False),
        sa.Column("batch_size", sa.Integer(), nullable=False),
        sa.Column("learning_rate", sa.Double(), nullable=False),
        sa.Column("signature_algorithm", sa.Integer(), nullable=True),
        sa.Column("signature_public_key", sa.LargeBinary(), nullable=True),
        sa.Column("signature_key_id", sa.String(length=64), nullable=True),
        sa.Column("kem_public_key", sa.LargeBinary(), nullable=True),
        sa.Column("kem_key_id", sa.String(length=64), nullable=True),
        sa.Column("key_rotation_count", sa.Integer(), nullable=False),
        sa.Column("registered_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("last_seen_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint(
            "state IN ('active', 'suspended', 'revoked', 'quarantined', 'inactive')",
            name=op.f("ck_devices_state"),
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_devices")),
        sa.UniqueConstraint("signature_key_id", name=op.f("uq_devices_signature_key_id")),
    )
    with op.batch_alter_table("devices", schema=None) as batch_op:
        batch_op.create_index(
            batch_op.f("ix_devices_device_type_id"), ["device_type", "id"], unique=False
        )
        batch_op.create_index(
            batch_op.f("ix_devices_device_type_state_id"),
            ["device_type", "state", "id"],
            unique=False,
        )
        batch_op.create_index(batch_op.f("ix_devices_last_seen_at"), ["last_seen_at"], unique=False)
        batch_op.create_index(
            batch_op.f("ix_devices_registered_at_id"), ["registered_at", "id"], unique=False
        )
        batch_op.create_index(batch_op.f("ix_devices_state_id"), ["state", "id"], unique=False)
        batch_op.create_index(
            batch_op.f("ix_devices_state_last_seen_at"), ["state", "last_seen_at"], unique=False
        )

    op.create_table(
        "epochs",
        sa.Column("id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("security", sa.BigInteger(), nullable=False),
        sa.Column("rounds", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_epochs")),
    )
    op.create_table(
        "idempotent_calls",
        sa.Column("request_id", sa.String(length=100), nullable=False),
        sa.Column("method", sa.String(length=200), nullable=False),
        sa.Column("request_digest", sa.String(length=64), nullable=False),
        sa.Column("response", sa.LargeBinary(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("request_id", "method", name=op.f("pk_idempotent_calls")),
    )
    with op.batch_alter_table("idempotent_calls", schema=None) as batch_op:
        batch_op.create_index(
            batch_op.f("ix_idempotent_calls_created_at"), ["created_at"], unique=False
        )

    op.create_table(
        "leases",
        sa.Column("name", sa.String(length=100), nullable=False),
        sa.Column("holder", sa.String(length=64), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_leases")),
    )
    op.create_table(
        "payload_chunks",
        sa.Column("payload_id", sa.String(length=32), nullable=False),
        sa.Column("chunk_index", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("data", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("payload_id", "chunk_index", name=op.f("pk_payload_chunks")),
    )
    op.create_table(
        "payloads",
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("chunk_digests", sa.LargeBinary(), nullable=False),
        sa.Column("location", sa.String(length=8), nullable=False),
        sa.Column("data", sa.LargeBinary(), nullable=True),
        sa.Column("sealed_header", sa.LargeBinary(), nullable=True),
        sa.Column("sealed_key", sa.LargeBinary(), nullable=True),
        sa.Column("content_digests", sa.LargeBinary(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("pruned_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint(
            "location IN ('row', 'store', 'none')", name=op.f("ck_payloads_location")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_payloads")),
    )
    op.create_table(
        "replicas",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("address", sa.String(length=255), nullable=False),
        sa.Column("version", sa.String(length=64), nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("seen_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_replicas")),
    )
    op.create_table(
        "training_sessions",
        sa.Column("id", sa.String(length=36), nullable=False),
        sa.Column("name", sa.String(length=200), nullable=False),
        sa.Column("model_type", sa.String(length=100), nullable=False),
        sa.Column("architecture", sa.JSON(), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("state_reason", sa.String(length=500), nullable=False),
        sa.Column("config", sa.JSON(), nullable=False),
        sa.Column("current_round", sa.Integer(), nullable=False),
        sa.Column("current_version", sa.Integer(), nullable=False),
        sa.Column("best_accuracy", sa.Double(), nullable=True),
        sa.Column("best_version", sa.Integer(), nullable=True),
        sa.Column("released_version", sa.Integer(), nullable=True),
        sa.Column("epsilon_spent", sa.Double(), nullable=True),
        sa.Column("privacy_state", sa.JSON(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("ended_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint(
            "state IN ('created', 'running', 'paused', 'completed', 'cancelled', 'failed')",
            name=op.f("ck_training_sessions_state"),
        ),
        sa.CheckConstraint(
            "current_version >= -1", name=op.f("ck_training_sessions_current_version")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_training_sessions")),
    )
    with op.batch_alter_table("training_sessions", schema=None) as batch_op:
        batch_op.create_index(
            batch_op.f("ix_training_sessions_created_at_id"), ["created_at", "id"], unique=False
        )
        batch_op.create_index(
            batch_op.f("ix_training_sessions_state_created_at_id"),
            ["state", "created_at", "id"],
            unique=False,
        )

    op.create_table(
        "trust_documents",
        sa.Column("kind", sa.String(length=8), nullable=False),
        sa.Column("version", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("envelope", sa.LargeBinary(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("kind", "version", name=op.f("pk_trust_documents")),
    )
    op.create_table(
        "used_nonces",
        sa.Column("nonce", sa.Text(), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("nonce", name=op.f("pk_used_nonces")),
    )
    with op.batch_alter_table("used_nonces", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_used_nonces_expires_at"), ["expires_at"], unique=False)

    op.create_table(
        "device_keys",
        sa.Column("key_id", sa.String(length=64), nullable=False),
        sa.Column("device_id", sa.String(length=255), nullable=False),
        sa.Column("sequence", sa.Integer(), nullable=False),
        sa.Column("algorithm", sa.Integer(), nullable=False),
        sa.Column("public_key", sa.LargeBinary(), nullable=False),
        sa.Column("kem_public_key", sa.LargeBinary(), nullable=True),
        sa.Column("statement", sa.LargeBinary(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("retired_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("retired_reason", sa.String(length=100), nullable=False),
        sa.ForeignKeyConstraint(
            ["device_id"], ["devices.id"], name=op.f("fk_device_keys_device_id")
        ),
        sa.PrimaryKeyConstraint("key_id", name=op.f("pk_device_keys")),
        sa.UniqueConstraint(
            "device_id", "sequence", name=op.f("uq_device_keys_device_id_sequence")
        ),
    )
    op.create_table(
        "global_models",
        sa.Column("training_session_id", sa.String(length=36), nullable=False),
        sa.Column("version", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("parent_digest", sa.String(length=64), nullable=False),
        sa.Column("payload_id", sa.String(length=32), nullable=False),
        sa.Column("payload_digest", sa.String(length=64), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("manifest", sa.LargeBinary(), nullable=False),
        sa.Column("layout_digest", sa.String(length=64), nullable=False),
        sa.Column("statement", sa.LargeBinary(), nullable=False),
        sa.Column("signature", sa.LargeBinary(), nullable=False),
        sa.Column("model_type", sa.String(length=100), nullable=False),
        sa.Column("architecture", sa.JSON(), nullable=False),
        sa.Column("base_version", sa.Integer(), nullable=False),
        sa.Column("round_number", sa.Integer(), nullable=False),
        sa.Column("participant_count", sa.Integer(), nullable=False),
        sa.Column("example_count", sa.BigInteger(), nullable=False),
        sa.Column("aggregation_method", sa.String(length=100), nullable=False),
        sa.Column("aggregation_parameters", sa.JSON(), nullable=False),
        sa.Column("strategy_state", sa.JSON(), nullable=False),
        sa.Column("contributors_digest", sa.String(length=64), nullable=False),
        sa.Column("accuracy", sa.Double(), nullable=True),
        sa.Column("loss", sa.Double(), nullable=True),
        sa.Column("metrics", sa.JSON(), nullable=False),
        sa.Column("group_metrics", sa.JSON(), nullable=False),
        sa.Column("epsilon", sa.Double(), nullable=True),
        sa.Column("delta", sa.Double(), nullable=True),
        sa.Column("released", sa.Boolean(), nullable=False),
        sa.Column("rollback_version", sa.Integer(), nullable=True),
        sa.Column("download_encoding", sa.Integer(), nullable=True),
        sa.Column("download_payload_id", sa.String(length=32), nullable=True),
        sa.Column("download_payload_digest", sa.String(length=64), nullable=True),
        sa.Column("download_size_bytes", sa.BigInteger(), nullable=True),
        sa.Column("publish_duration_s", sa.Double(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint("version >= 0", name=op.f("ck_global_models_version")),
        sa.ForeignKeyConstraint(
            ["payload_id"], ["payloads.id"], name=op.f("fk_global_models_payload_id")
        ),
        sa.ForeignKeyConstraint(
            ["download_payload_id"],
            ["payloads.id"],
            name=op.f("fk_global_models_download_payload_id"),
        ),
        sa.ForeignKeyConstraint(
            ["training_session_id"],
            ["training_sessions.id"],
            name=op.f("fk_global_models_training_session_id"),
        ),
        sa.PrimaryKeyConstraint("training_session_id", "version", name=op.f("pk_global_models")),
        sa.UniqueConstraint("digest", name=op.f("uq_global_models_digest")),
    )
    with op.batch_alter_table("global_models", schema=None) as batch_op:
        batch_op.create_index(
            batch_op.f("ix_global_models_created_at"), ["created_at"], unique=False
        )
        batch_op.create_index(
            batch_op.f("ix_global_models_payload_id"), ["payload_id"], unique=False
        )

    op.create_table(
        "rounds",
        sa.Column("training_session_id", sa.String(length=36), nullable=False),
        sa.Column("number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("state_reason", sa.String(length=500), nullable=False),
        sa.Column("base_version", sa.Integer(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=True),
        sa.Column("quorum", sa.Integer(), nullable=False),
        sa.Column("target", sa.Integer(), nullable=False),
        sa.Column("selected_count", sa.Integer(), nullable=False),
        sa.Column("accepted_count", sa.Integer(), nullable=False),
        sa.Column("rejected_count", sa.Integer(), nullable=False),
        sa.Column("example_count", sa.BigInteger(), nullable=False),
        sa.Column("nonce", sa.String(length=64), nullable=False),
        sa.Column("task", sa.LargeBinary(), nullable=True),
        sa.Column("opened_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("deadline_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("closed_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("published_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint(
            "state IN ('open', 'closed', 'published', 'failed', 'cancelled')",
            name=op.f("ck_rounds_state"),
        ),
        sa.ForeignKeyConstraint(
            ["training_session_id"],
            ["training_sessions.id"],
            name=op.f("fk_rounds_training_session_id"),
        ),
        sa.PrimaryKeyConstraint("training_session_id", "number", name=op.f("pk_rounds")),
    )
    with op.batch_alter_table("rounds", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_rounds_published_at"), ["published_at"], unique=False)
        batch_op.create_index(
            batch_op.f("ix_rounds_state_deadline_at"), ["state", "deadline_at"], unique=False
        )

    op.create_table(
        "uploads",
        sa.Column("payload_id", sa.String(length=32), nullable=False),
        sa.Column("update_id", sa.String(length=36), nullable=True),
        sa.Column("device_id", sa.String(length=255), nullable=True),
        sa.Column("statement_digest", sa.String(length=64), nullable=False),
        sa.Column("sealed_key", sa.LargeBinary(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("touched_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["device_id"], ["devices.id"], name=op.f("fk_uploads_device_id")),
        sa.PrimaryKeyConstraint("payload_id", name=op.f("pk_uploads")),
        sa.UniqueConstraint("update_id", name=op.f("uq_uploads_update_id")),
    )
    with op.batch_alter_table("uploads", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_uploads_device_id"), ["device_id"], unique=False)
        batch_op.create_index(batch_op.f("ix_uploads_touched_at"), ["touched_at"], unique=False)

    op.create_table(
        "user_tokens",
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column("token_hash", sa.String(length=64), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("subject", sa.String(length=255), nullable=False),
        sa.Column("device_id", sa.String(length=255), nullable=True),
        sa.Column("family_id", sa.String(length=32), nullable=True),
        sa.Column("roles", sa.JSON(), nullable=False),
        sa.Column("binding_key", sa.LargeBinary(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("used_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("last_used_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("revoked_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("revoked_reason", sa.String(length=200), nullable=False),
        sa.CheckConstraint(
            "kind IN ('enrollment', 'access', 'refresh', 'admin')", name=op.f("ck_user_tokens_kind")
        ),
        sa.ForeignKeyConstraint(
            ["device_id"], ["devices.id"], name=op.f("fk_user_tokens_device_id")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_user_tokens")),
        sa.UniqueConstraint("token_hash", name=op.f("uq_user_tokens_token_hash")),
    )
    with op.batch_alter_table("user_tokens", schema=None) as batch_op:
        batch_op.create_index(
            batch_op.f("ix_user_tokens_device_id_kind"), ["device_id", "kind"], unique=False
        )
        batch_op.create_index(batch_op.f("ix_user_tokens_expires_at"), ["expires_at"], unique=False)
        batch_op.create_index(batch_op.f("ix_user_tokens_family_id"), ["family_id"], unique=False)
        batch_op.create_index(
            batch_op.f("ix_user_tokens_kind_created_at_id"),
            ["kind", "created_at", "id"],
            unique=False,
        )

    op.create_table(
        "evaluations",
        sa.Column("training_session_id", sa.String(length=36), nullable=False),
        sa.Column("version", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("device_id", sa.String(length=255), nullable=False),
        sa.Column("example_count", sa.BigInteger(), nullable=False),
        sa.Column("metrics", sa.JSON(), nullable=False),
        sa.Column("device_group", sa.String(length=100), nullable=False),
        sa.Column("reported_at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint("example_count > 0", name=op.f("ck_evaluations_example_count")),
        sa.ForeignKeyConstraint(
            ["device_id"], ["devices.id"], name=op.f("fk_evaluations_device_id")
        ),
        sa.ForeignKeyConstraint(
            ["training_session_id", "version"],
            ["global_models.training_session_id", "global_models.version"],
            name=op.f("fk_evaluations_training_session_id_version"),
        ),
        sa.PrimaryKeyConstraint(
            "training_session_id", "version", "device_id", name=op.f("pk_evaluations")
        ),
    )
    op.create_table(
        "model_updates",
        sa.Column("id", sa.String(length=36), nullable=False),
        sa.Column("training_session_id", sa.String(length=36), nullable=False),
        sa.Column("round_number", sa.Integer(), nullable=False),
        sa.Column("device_id", sa.String(length=255), nullable=False),
        sa.Column("base_version", sa.Integer(), nullable=False),
        sa.Column("payload_id", sa.String(length=32), nullable=False),
        sa.Column("payload_digest", sa.String(length=64), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("statement", sa.LargeBinary(), nullable=True),
        sa.Column("statement_digest", sa.String(length=64), nullable=False),
        sa.Column("signature", sa.LargeBinary(), nullable=True),
        sa.Column("key_id", sa.String(length=64), nullable=True),
        sa.Column("example_count", sa.BigInteger(), nullable=False),
        sa.Column("loss", sa.Double(), nullable=True),
        sa.Column("accuracy", sa.Double(), nullable=True),
        sa.Column("local_epochs", sa.Integer(), nullable=True),
        sa.Column("training_time_s", sa.Double(), nullable=True),
        sa.Column("metrics", sa.JSON(), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("state_reason", sa.String(length=500), nullable=False),
        sa.Column("acceptance_sequence", sa.BigInteger(), nullable=False),
        sa.Column("validation_score", sa.Double(), nullable=True),
        sa.Column("aggregated_version", sa.Integer(), nullable=True),
        sa.Column("accepted_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("aggregated_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint(
            "state IN ('pending', 'aggregated', 'rejected')", name=op.f("ck_model_updates_state")
        ),
        sa.CheckConstraint("example_count > 0", name=op.f("ck_model_updates_example_count")),
        sa.ForeignKeyConstraint(
            ["device_id"], ["devices.id"], name=op.f("fk_model_updates_device_id")
        ),
        sa.ForeignKeyConstraint(
            ["payload_id"], ["payloads.id"], name=op.f("fk_model_updates_payload_id")
        ),
        sa.ForeignKeyConstraint(
            ["training_session_id", "round_number"],
            ["rounds.training_session_id", "rounds.number"],
            name=op.f("fk_model_updates_training_session_id_round_number"),
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_model_updates")),
        sa.UniqueConstraint(
            "training_session_id",
            "round_number",
            "acceptance_sequence",
            name="uq_model_updates_sequence",
        ),
        sa.UniqueConstraint(
            "training_session_id",
            "round_number",
            "device_id",
            "base_version",
            name="uq_model_updates_contribution",
        ),
    )
    with op.batch_alter_table("model_updates", schema=None) as batch_op:
        batch_op.create_index(
            batch_op.f("ix_model_updates_device_id_accepted_at"),
            ["device_id", "accepted_at"],
            unique=False,
        )
        batch_op.create_index(
            "ix_model_updates_lineage",
            ["training_session_id", "aggregated_version", "acceptance_sequence"],
            unique=False,
        )
        batch_op.create_index(
            batch_op.f("ix_model_updates_payload_id"), ["payload_id"], unique=False
        )

    op.create_table(
        "round_devices",
        sa.Column("training_session_id", sa.String(length=36), nullable=False),
        sa.Column("round_number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("device_id", sa.String(length=255), nullable=False),
        sa.ForeignKeyConstraint(
            ["device_id"], ["devices.id"], name=op.f("fk_round_devices_device_id")
        ),
        sa.ForeignKeyConstraint(
            ["training_session_id", "round_number"],
            ["rounds.training_session_id", "rounds.number"],
            name=op.f("fk_round_devices_training_session_id_round_number"),
        ),
        sa.PrimaryKeyConstraint(
            "training_session_id", "round_number", "device_id", name=op.f("pk_round_devices")
        ),
    )


def downgrade() -> None:
    """Downgrade the schema to the previous revision."""
    op.drop_table("round_devices")
    with op.batch_alter_table("model_updates", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_model_updates_payload_id"))
        batch_op.drop_index("ix_model_updates_lineage")
        batch_op.drop_index(batch_op.f("ix_model_updates_device_id_accepted_at"))

    op.drop_table("model_updates")
    op.drop_table("evaluations")
    with op.batch_alter_table("user_tokens", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_user_tokens_kind_created_at_id"))
        batch_op.drop_index(batch_op.f("ix_user_tokens_family_id"))
        batch_op.drop_index(batch_op.f("ix_user_tokens_expires_at"))
        batch_op.drop_index(batch_op.f("ix_user_tokens_device_id_kind"))

    op.drop_table("user_tokens")
    with op.batch_alter_table("uploads", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_uploads_touched_at"))
        batch_op.drop_index(batch_op.f("ix_uploads_device_id"))

    op.drop_table("uploads")
    with op.batch_alter_table("rounds", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_rounds_state_deadline_at"))
        batch_op.drop_index(batch_op.f("ix_rounds_published_at"))

    op.drop_table("rounds")
    with op.batch_alter_table("global_models", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_global_models_payload_id"))
        batch_op.drop_index(batch_op.f("ix_global_models_created_at"))

    op.drop_table("global_models")
    op.drop_table("device_keys")
    with op.batch_alter_table("used_nonces", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_used_nonces_expires_at"))

    op.drop_table("used_nonces")
    op.drop_table("trust_documents")
    with op.batch_alter_table("training_sessions", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_training_sessions_state_created_at_id"))
        batch_op.drop_index(batch_op.f("ix_training_sessions_created_at_id"))

    op.drop_table("training_sessions")
    op.drop_table("replicas")
    op.drop_table("payloads")
    op.drop_table("payload_chunks")
    op.drop_table("leases")
    with op.batch_alter_table("idempotent_calls", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_idempotent_calls_created_at"))

    op.drop_table("idempotent_calls")
    op.drop_table("epochs")
    with op.batch_alter_table("devices", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_devices_state_last_seen_at"))
        batch_op.drop_index(batch_op.f("ix_devices_state_id"))
        batch_op.drop_index(batch_op.f("ix_devices_registered_at_id"))
        batch_op.drop_index(batch_op.f("ix_devices_last_seen_at"))
        batch_op.drop_index(batch_op.f("ix_devices_device_type_state_id"))
        batch_op.drop_index(batch_op.f("ix_devices_device_type_id"))

    op.drop_table("devices")
    op.drop_table("audit_nodes")
    with op.batch_alter_table("audit_log", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_audit_log_subject_created_at_id"))
        batch_op.drop_index(batch_op.f("ix_audit_log_risk_level_created_at_id"))
        batch_op.drop_index(
            "ix_audit_log_pending",
            sqlite_where=sa.text("leaf_index IS NULL"),
            postgresql_where=sa.text("leaf_index IS NULL"),
        )
        batch_op.drop_index(batch_op.f("ix_audit_log_event_type_created_at_id"))
        batch_op.drop_index(batch_op.f("ix_audit_log_created_at_id"))
        batch_op.drop_index(batch_op.f("ix_audit_log_actor_created_at_id"))

    op.drop_table("audit_log")
    op.drop_table("audit_heads")
