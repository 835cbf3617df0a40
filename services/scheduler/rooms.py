"""What is free in the ledger's own account: by looking at every node, each time it is asked."""

from libs.contracts.events import JobRequested
from services.scheduler.allowances import Allowances
from services.scheduler.sheets import Attempt, Sheet, gpus_of, milli_of


class Rooms(Allowances):
    def __init__(self) -> None:
        super().__init__()
        self.sheets: dict[str, Sheet] = {}
        self.touched: set[str] = set()
        """By the stimulus that is being handled."""

    def on(self, node: str) -> list[Attempt]:
        return [attempt for attempt in self.live.values() if node in attempt.shares]

    def remove(self, attempt: Attempt) -> None:
        del self.live[attempt.key]
        self.book(attempt, -1)

    def restore(self, attempt: Attempt) -> None:
        self.live[attempt.key] = attempt
        self.book(attempt, 1)

    def book(self, attempt: Attempt, sign: int) -> None:
        request = self.requests[attempt.key]
        for name, share in attempt.shares.items():
            sheet = self.sheets[name]
            sheet.cpu_milli += sign * share.workers * request.resources.cpu_milli
            sheet.memory_mib += sign * share.workers * request.resources.memory_mib
            assert len(share.gpus) == (share.workers if gpus_of(request) else 0), share
            for worker in share.gpus:
                assert len(set(worker)) == len(worker) == gpus_of(request), share
                for gpu in worker:
                    taken = sheet.gpu_milli.get(gpu, 0) + sign * milli_of(request)
                    sheet.gpu_milli[gpu] = taken
            self.touched.add(name)

    def fits(self, request: JobRequested) -> bool:
        """Whether quota and nodes have room, by looking at all of them."""
        models: list[str | None] = [None]
        spec = self.specs.get(request.queue)
        if spec and gpus_of(request) and any("/" in name for name in spec.nominal):
            present = {sheet.last.gpu_model for sheet in self.sheets.values()}
            models = [*(set(request.gpu_models) or present - {""})]
        return any(self.fits_on(request, model) for model in models)

    def fits_on(self, request: JobRequested, model: str | None) -> bool:
        by_model = {} if model is None else {model: request.workers}
        return not self.beyond_quota(request, by_model) and self.has_room(request, model)

    def has_room(self, request: JobRequested, model: str | None) -> bool:
        sheets = [sheet for sheet in self.sheets.values() if sheet.suits(request)]
        if model is not None:
            sheets = [sheet for sheet in sheets if sheet.last.gpu_model == model]
        rooms = [sheet.room(request) for sheet in sheets]
        whole = max((sheet.room(request, empty=True) for sheet in sheets), default=0)
        together = gpus_of(request) and whole >= request.workers
        if request.topology == "node" or together:
            return max(rooms, default=0) >= request.workers
        return sum(rooms) >= request.workers
