"""ModelStreamInfer: requests run at the same time, and their answers go back as the protocol says.

A model with one answer a request answers in the order of the requests; a decoupled one whenever it
has something. An error is an answer: the stream goes on.
"""

import asyncio
import logging
from collections.abc import AsyncIterator

from libs.contracts.protos import open_inference_pb2 as oip
from libs.doors import Internal, Refused
from libs.doors.serve import cancelled
from services.inference import domain, protocol
from services.inference.calls import Answer, Call
from services.inference.endpoints import Endpoints
from services.inference.protocol import FINAL, Wanted
from services.inference.sharedmemory import SharedMemory

log = logging.getLogger(__name__)
PENDING_MAX = 64
"""Of one stream: requests that are not answered, and answers that are not sent."""


class Stream:
    """Of one client."""

    def __init__(self, endpoints: Endpoints, memory: SharedMemory, context: object) -> None:
        self.endpoints = endpoints
        self.memory = memory
        self.context = context
        self.out: asyncio.Queue[oip.ModelStreamInferResponse | None] = asyncio.Queue()
        self.unsent = asyncio.Semaphore(PENDING_MAX)
        self.unanswered = asyncio.Semaphore(PENDING_MAX)
        self.answering: set[asyncio.Task[None]] = set()

    async def answers(
        self, requests: AsyncIterator[oip.ModelInferRequest]
    ) -> AsyncIterator[oip.ModelStreamInferResponse]:
        reading = asyncio.create_task(self.read(requests))
        reading.add_done_callback(lambda _: self.out.put_nowait(None))
        try:
            while (response := await self.out.get()) is not None:
                yield response
                self.unsent.release()
            await reading
        finally:
            await cancelled([reading, *self.answering])

    async def read(self, requests: AsyncIterator[oip.ModelInferRequest]) -> None:
        """Until the client has sent its last request and everything is answered."""
        before: list[asyncio.Event] = []
        async for request in requests:
            await self.unanswered.acquire()
            before = [turn for turn in before if not turn.is_set()]
            turn = asyncio.Event()
            task = asyncio.create_task(self.answer(request, before, turn))
            before = [*before, turn]
            self.answering.add(task)
            task.add_done_callback(self.answered)
        while self.answering:
            await asyncio.gather(*self.answering)

    def answered(self, task: asyncio.Task[None]) -> None:
        self.answering.discard(task)
        self.unanswered.release()

    def is_decoupled(self, request: oip.ModelInferRequest) -> bool:
        try:
            return self.endpoints.is_decoupled(request.model_name, request.model_version)
        except Refused:
            return False

    async def answer(
        self, request: oip.ModelInferRequest, before: list[asyncio.Event], turn: asyncio.Event
    ) -> None:
        """A model that sleeps says whether it is decoupled once it is awake; those behind it run
        meanwhile."""
        refusal = await self.refusal(request)
        if refusal is None and self.is_decoupled(request):
            turn.set()
            await self.answer_freely(request)
            return
        response = failed(request, refusal) if refusal else await self.only_answer(request)
        for other in before:
            await other.wait()
        await self.put(response)
        turn.set()

    async def refusal(self, request: oip.ModelInferRequest) -> Refused | None:
        try:
            await self.endpoints.bring(request.model_name, protocol.deadline_of(self.context))
        except Refused as error:
            return error
        return None

    async def only_answer(self, request: oip.ModelInferRequest) -> oip.ModelStreamInferResponse:
        try:
            call, wanted = protocol.call_of(request, self.memory, self.context)
            answer = await self.endpoints.infer(call)
            return await self.response(answer, wanted, final=True)
        except Refused as error:
            return failed(request, error)
        except Exception as error:  # the others of the stream are answered
            return failed(request, unexpected(request, error))

    async def answer_freely(self, request: oip.ModelInferRequest) -> None:
        try:
            call, wanted = protocol.call_of(request, self.memory, self.context)
            call = call._replace(version=self.endpoints.chosen(call).version)
            async for answer in self.endpoints.stream(call):
                await self.put(await self.response(answer, wanted, final=False))
            if wanted.empty_final:
                await self.put(last(call))
        except Refused as error:
            await self.put(failed(request, error))
        except Exception as error:  # as above
            await self.put(failed(request, unexpected(request, error)))

    async def response(
        self, answer: Answer, wanted: Wanted, final: bool
    ) -> oip.ModelStreamInferResponse:
        response = await protocol.response_of(answer, wanted)
        response.parameters[FINAL].bool_param = final
        return oip.ModelStreamInferResponse(infer_response=response)

    async def put(self, response: oip.ModelStreamInferResponse) -> None:
        await self.unsent.acquire()
        self.out.put_nowait(response)


def last(call: Call) -> oip.ModelStreamInferResponse:
    """Says that there is nothing more to this request."""
    response = oip.ModelInferResponse(model_name=call.model, model_version=call.version, id=call.id)
    response.parameters[FINAL].bool_param = True
    return oip.ModelStreamInferResponse(infer_response=response)


def unexpected(request: oip.ModelInferRequest, error: Exception) -> Internal:
    log.error("a streamed request of model '%s' failed", request.model_name, exc_info=error)
    return Internal(f"Unexpected {type(error)}: {error}")


def failed(request: oip.ModelInferRequest, error: Refused) -> oip.ModelStreamInferResponse:
    """With the request's id, by which a client knows what failed."""
    named = oip.ModelInferResponse(id=request.id[: domain.ID_CHARACTERS_MAX])
    named.parameters[FINAL].bool_param = True
    return oip.ModelStreamInferResponse(error_message=str(error), infer_response=named)
