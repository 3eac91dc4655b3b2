"""Reading numbers from a device without waiting for what was queued after them."""

import torch
from torch import Tensor


class HostValues:
    """Numbers on their way from a device; `read` waits for them alone, not for what was queued after them."""

    def __init__(self, values: Tensor):
        self._values, self._event = values, None
        self._numbers: list[float] | None = None
        if values.is_cuda:
            self._values = torch.empty_like(values, device="cpu", pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(values.device))

    @property
    def here(self) -> bool:
        """Whether reading needs no waiting, whatever the device does."""
        return self._event is None

    @property
    def arrived(self) -> bool:
        """Whether reading needs no waiting now."""
        return self._event is None or self._event.query()

    def read(self) -> list[float]:
        if self._numbers is None:
            if self._event is not None:
                self._event.synchronize()
            self._numbers = self._values.tolist()
        return self._numbers
