"""Secure aggregation in a simulation: the helpers, with the code of `qflare_helper`, in this program.

A simulated helper has keys, a ledger and a policy of its own in a folder of the coordinator's, and checks and answers
requests with the code of a real one. Only its network is left out: parts of requests and responses are handed over as
they are. It protects nobody, since it runs beside the coordinator. Secure aggregation with neighbors needs no helper:
`group_steps` has the steps of its devices.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from qflare.evidence.unmasking import MAX_HELPER_COUNT, MIN_COHORT
from qflare.v1 import helper_service_pb2 as messages
from qflare.v1 import security_pb2, training_pb2
from qflare_helper.errors import BusyError, HelperError, StoreError
from qflare_helper.exchange import header_of, respond
from qflare_helper.identity import HelperIdentity
from qflare_helper.ledger import Ledger
from qflare_helper.policy import write_policy
from qflare_helper.unmasking import Unmasking
from qflare_server.errors import HelperRefusedError, HelperUnavailableError
from qflare_server.keys.server_keys import ServerKeys
from qflare_server.keys.setup import bootstrap_bundle
from qflare_server.training.neighbor_stages import has_neighbors
from qflare_simulation.clock import VirtualClock
from qflare_simulation.seeds import SeededNoise

MAX_VECTOR_BYTES: Final = 8 * 2**30
_ADDRESS: Final = "localhost:1"
"""Of coordinator and helpers, which nothing is sent to."""


class SimulatedHelpers:
    """Helpers in this program, each of which stands for one that a configuration names.

    Args:
        folder: Created; holds a folder for each helper.
        names: Ids of the helpers in the configuration; without any, there is one helper.
        keys: Of the coordinator, which signs requests with its task key.
        clock: The virtual time.
        seed: Of the simulation, for noise.
    """

    def __init__(
        self,
        folder: Path,
        names: Sequence[str],
        keys: ServerKeys,
        clock: VirtualClock,
        seed: int,
    ) -> None:
        self.sign_request = keys.sign_request
        self._identities: dict[str, HelperIdentity] = {}
        self._unmasking: dict[str, Unmasking] = {}
        pinned = bootstrap_bundle(keys.trust, _ADDRESS)
        # One more than a training session may have, so that the coordinator refuses too many itself.
        for name in [*dict.fromkeys(names or [""])][: MAX_HELPER_COUNT + 1]:
            identity = HelperIdentity.generate(pinned, _ADDRESS, "")
            home = folder / identity.helper_id
            home.mkdir(parents=True)
            write_policy(home, MIN_COHORT)
            self._identities[name] = identity
            self._unmasking[identity.helper_id] = Unmasking(
                identity,
                Ledger(home),
                home,
                MAX_VECTOR_BYTES,
                clock,
                SeededNoise(seed, "helper noise", name).draw,
            )

    def stand_for(self, names: Sequence[str]) -> list[str]:
        """Return the ids of the helpers that stand for those of a configuration."""
        known = self._identities
        return [known[name].helper_id for name in names or [""] if name in known]

    def documents(self) -> Mapping[str, security_pb2.SignedEnvelope]:
        """Return the signed documents by helper id."""
        return {
            identity.helper_id: identity.bundle.document for identity in self._identities.values()
        }

    def unmask(
        self, helper_id: str, parts: Iterator[messages.UnmaskRequest]
    ) -> Iterator[messages.UnmaskResponse]:
        """Call a helper.

        Raises:
            HelperUnavailableError: While iterating: it is unknown, or cannot use its files.
            HelperRefusedError: While iterating: it refused.
        """
        unmasking = self._unmasking.get(helper_id)
        if unmasking is None:
            raise HelperUnavailableError(f"no helper {helper_id} in this simulation")
        try:
            yield from respond(unmasking, unmasking.open(header_of(parts)), parts)
        except (StoreError, BusyError) as error:
            raise HelperUnavailableError(f"helper {helper_id}: {error}") from error
        except HelperError as error:
            raise HelperRefusedError(f"helper {helper_id}: {error}") from error

    def close(self) -> None:
        """Do nothing: the ledger opens its file for each call."""


def helper_names(config: training_pb2.TrainingConfig) -> Sequence[str] | None:
    """Return the helpers that a configuration names; None if it has secure aggregation with none of them."""
    policy = config.secure_aggregation
    return list(policy.helpers) if policy.mode and not has_neighbors(config) else None
