# SPDX-License-Identifier: Apache-2.0
"""The project's errors. Each message is a sentence that says what to change.

* VTPruneError
  * SettingsError: a request's settings (the client's to change; HTTP 400)
  * OperatorError: what the operator set or chose (refused at start)
    * PolicyError: a setting of policy or limits
    * UnsupportedConfigError: a prune layer beside something of vLLM's that it cannot work with
    * ScheduleError: prune layers that cannot work together (`vllm_vtprune.kv_drop.schedule`)
    * CheckpointError: a model that cannot be pruned, or whose files lack something
    * UnsupportedError: the version or front end of vLLM
  * TowerLostError: the process of a shared vision tower died twice
  * LoadTestError: a load test that cannot run (`vtprune_loadtest.errors`)
    * PicturesUsedUp (`vtprune_loadtest.images`)
  * StreamError: a stream of events that breaks its protocol (`vtprune_loadtest.stream`)
  * RunnerError: an evaluation that cannot run (`vtprune_eval.backend`)
  * DataError: questions of an evaluation or a load test (`vtprune_loadtest.questions`)
  * SearchError: no schedule does what a calibration asks (`vtprune_calibrate.search`)
  * JournalError: the journal of another calibration (`vtprune_calibrate.journal`)

Apart from these stand `PrivateAddressError` (`vtprune_server.media`), which has to be one of vLLM's own for
vLLM to answer it, and `StepFailedError` of the set-up script, which runs before anything is installed.

All that may pass through vLLM are `ValueError` too: its configuration and its renderer hand on no others.
"""


class VTPruneError(Exception):
    """Root of the project's errors."""


class SettingsError(VTPruneError, ValueError):
    """Settings that cannot be served.

    Attributes:
        param: the header or body field to blame, as the client wrote it.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class OperatorError(VTPruneError):
    """What the operator set or chose cannot work."""


class PolicyError(OperatorError, ValueError):
    """An operator's setting that cannot work."""


class UnsupportedConfigError(OperatorError, ValueError):
    """A prune layer that does not fit the model, or something of vLLM's beside it."""


class CheckpointError(OperatorError, ValueError):
    """A model that cannot be pruned, or whose files lack something."""


class TowerLostError(VTPruneError, RuntimeError):
    """The process of a shared vision tower died, and again when the request was sent once more."""


class UnsupportedError(OperatorError, RuntimeError):
    """A version or a front end of vLLM that the plugin does not fit."""
