"""Names that programs and plug-ins import keep working: none goes, whatever is moved inside."""

import importlib
import subprocess
import sys

import pytest

PUBLIC = {
    "qflare_client": """
        Algorithm AlgorithmNotAcceptedError AuditHead AuthenticationError BusyError Client
        CoordinatorFaultError CorruptModelError DeadlineExceededError DeviceRevokedError
        DeviceSuspendedError DuplicateUpdateError Evidence FailedPreconditionError
        GlobalModel Heartbeat InvalidEnrollmentTokenError InvalidEvidenceError
        InvalidRequestError InvalidStatementError KeyStoreError KeyStoreLockedError
        LocalPrivacy NotEnrolledError NotFoundError NotSelectedError PermissionDeniedError
        ProgressHook QflareClientError Receipt RejectedError RetryPolicy RewrittenLogError
        RolledBackModelError RoundNotOpenError RunSummary SealKeyNotAcceptedError
        SealingMismatchError StaleBaseVersionError Task TaskKind Tls TrainingDefaults
        TrainingFunctionError TrainingTask UnavailableError UnsupportedTaskError
        UntrustedKeysetError UpdateEvidence VerificationError Version WrongPassphraseError
        enroll proximal_gradient run
    """,
    "qflare_server.aggregator": """
        aggregate_models clear_pending_updates close configure get_aggregation_metrics
        get_aggregation_status get_global_model get_model_updates_for_device
        reset_aggregation_state store_model_update validate_model_update
    """,
    "qflare_server.registry": """
        check_device_health cleanup_inactive_devices close configure get_device_capabilities
        get_device_count get_device_info get_registered_devices get_registry_stats
        list_active_devices register_device remove_device update_device_keys
        update_device_status
    """,
    "qflare_server.strategies": """
        Accumulator Aggregation Contribution Facts Judgement NotEnoughUpdatesError Outcome
        Prior PrivacyBudgetExceededError PrivacyConfig Reader Strategy StrategyConfig
        StrategyConfigError StrategyError VersionSlice begin build by_update
        outcome_from_data outcome_to_data
    """,
    "qflare_server.strategies.testkit": "check_strategy",
}
"""Modules that are public, and their names in the first version that had a plan of its rooms."""


@pytest.mark.parametrize("module", PUBLIC)
def test_every_public_name_is_still_there(module: str) -> None:
    names = PUBLIC[module].split()
    found = importlib.import_module(module)

    assert [name for name in names if not hasattr(found, name)] == []
    assert set(names) <= set(getattr(found, "__all__", names))


@pytest.mark.parametrize("module", PUBLIC)
def test_a_public_module_is_imported_without_a_warning(module: str) -> None:
    names = ", ".join(PUBLIC[module].split())
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", f"from {module} import {names}"],
        capture_output=True,
        text=True,
        check=False,
    )

    assert (done.returncode, done.stderr) == (0, "")
