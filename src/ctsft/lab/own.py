"""The papers' experiments on a user's own model and text: what takes the place of what. Nothing here imports torch."""

from typing import Annotated

from pydantic import Field

from ctsft.choices import FORMS
from ctsft.lab.schedule import parse_schedule
from ctsft.lab.spec import Method, Spec, Strict, replaced


class Own(Strict):
    """A model and a text that take the place of the laboratory's, and what an arm must know of them."""

    model: str = Field(description="what `load_model` takes; a folder as its whole path")
    weights: str = Field(default="", description="fingerprint of the weights, unless the model is the laboratory's")
    text: str = Field(description="what `load_corpus` takes; a file as its whole path")
    corpus: str = Field(default="", description="hash of the file's bytes, if the text is one")
    tied: bool = Field(default=True, description="whether the output head is the embedding")
    narrowest: Annotated[int, Field(ge=1)] = Field(description="the smallest side of a matrix of its blocks")
    width: Annotated[int, Field(ge=1)] = Field(description="d_model")
    lacks: tuple[Method, ...] = Field(default=(), description="methods that this kind of model cannot have")

    def placed(self, spec: Spec) -> Spec:
        """`spec` on this model and text."""
        return replaced(spec, model=self.model, weights=self.weights, text=self.text, corpus=self.corpus)

    def refusal(self, spec: Spec, home: Spec) -> str:
        """Why `spec`, of a laboratory that is at `home` on one model and text, cannot be placed; empty if it can."""
        if spec.model != home.model:
            return f"runs of {spec.model}"
        if spec.text != home.text:
            return f"runs on {spec.text}"
        if not spec.tied and not self.tied:
            return "runs with a random head in place of a tied one, which this model does not have"
        if spec.method in self.lacks:
            return f"{spec.method}, which peft does not know for this kind of model"
        if spec.method in (*FORMS, "lora-xs"):
            one_sided = spec.method == "scores" and spec.basis == "universal"
            most = self.width if one_sided else self.narrowest
            if max(k for _, k in parse_schedule(spec.schedule or str(spec.k))) > most:
                return f"K above {most}, which is all that this model's narrowest matrix has"
        return ""
