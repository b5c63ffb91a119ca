"""Generate synthetic data with a local model."""

from collections.abc import Callable, Iterator, Sequence

from rmkv_cli.data.chat import pieces_of
from rmkv_cli.data.synthetic import REFUSED, Answer, Request, Write
from rmkv_cli.errors import UserError
from rmkv_cli.generation.decoder import Decoder
from rmkv_cli.generation.generate import together
from rmkv_cli.generation.hashes import model_hash
from rmkv_cli.generation.prompt import read_prompt, require_fit, require_positions
from rmkv_cli.generation.sampling import SamplingConfig
from rmkv_cli.generation.text import Text
from rmkv_cli.model import RMKV
from rmkv_cli.tokenizer import Piece, Tokenizer


def local_writer(model: RMKV, tokenizer: Tokenizer, parallel: int) -> tuple[Write, str]:
    """Return a function that answers requests with the model, `parallel` at a time, and the model's identity.

    It refuses prompts that the model cannot read, and raises `UserError` if logits are not finite.

    Raises:
        UserError: the model cannot generate, or the tokenizer does not fit it.
    """
    require_fit(model, tokenizer)

    def write(requests: Sequence[Request], done: Callable[[Request, Answer], None]) -> None:
        asked: dict[Text, Request] = {}
        read: dict[Text, int] = {}

        def texts() -> Iterator[Text]:
            for request in requests:
                body = request.body
                names = SamplingConfig.model_fields.keys() & body.keys()
                config = SamplingConfig(**{name: body[name] for name in names})
                try:
                    prompt = read_prompt(model, tokenizer, _pieces(request, tokenizer))
                    require_positions(model, prompt.state, body["max_tokens"] - 1)
                except (UserError, ValueError) as error:
                    done(request, Answer(str(error), REFUSED))
                    continue
                text = Text(tokenizer, prompt, config, body["max_tokens"], answer="messages" in body)
                asked[text], read[text] = request, prompt.tokens
                yield text

        for text in together(Decoder(model, parallel), texts()):
            if text.fault is not None:
                raise text.fault
            reason = "length" if text.stop_reason == "length" else "stop"
            done(asked.pop(text), Answer(text.text, reason, read.pop(text), len(text.ids)))

    return write, f"{model_hash(model)} {tokenizer.hash}"


def _pieces(request: Request, tokenizer: Tokenizer) -> tuple[Piece, ...]:
    if "prompt" in request.body:
        return (request.body["prompt"],)
    return pieces_of([(message["role"], message["content"]) for message in request.body["messages"]], tokenizer)
