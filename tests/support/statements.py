"""A statement of each kind that a coordinator signs, complete enough for its verifiers."""

from typing import Final

from qflare.v1 import security_pb2

DIGEST: Final = "ab" * 32


def statement_of(role: security_pb2.KeyRole.ValueType) -> bytes:
    """Return the bytes of a statement that the key of a role may sign."""
    statements = {
        security_pb2.KEY_ROLE_MODEL: security_pb2.ModelStatement(
            realm="realm",
            training_session_id="session",
            base_version=-1,
            layout_digest=DIGEST,
            payload_digest=DIGEST,
        ),
        security_pb2.KEY_ROLE_REGISTRAR: security_pb2.EnrollmentReceipt(
            realm="realm", device_id="device", signature_key_id=DIGEST, kem_key_id=DIGEST
        ),
        security_pb2.KEY_ROLE_LOG: security_pb2.TreeHead(
            origin="realm/audit", size=1, root_digest=DIGEST
        ),
        security_pb2.KEY_ROLE_TASK: security_pb2.TaskStatement(
            realm="realm",
            training_session_id="session",
            round_number=1,
            base_digest=DIGEST,
            task_nonce=DIGEST,
            config_digest=DIGEST,
        ),
    }
    return statements[role].SerializeToString(deterministic=True)
