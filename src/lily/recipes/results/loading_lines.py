"""The lines of a model card that load an adapter, or what was exported from one, as they can be pasted."""

from __future__ import annotations

from collections.abc import Sequence

from lily.recipes.models import AUTO_CLASSES
from lily.recipes.models.reference import on_hub
from lily.recipes.spec.schema import Recipe

MANY = 50  # classes that a card lists; more are read from labels.json

CODE = ", trust_remote_code=True"
HERE = 'folder = "."  # this folder, or its id on the Hub'
QUANTIZED = {
    "none": "",
    "int8": "BitsAndBytesConfig(load_in_8bit=True)",
    "nf4": 'BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)',
}


def adapter_lines(recipe: Recipe, labels: Sequence[str] | None, *, method: str, new_head: bool = False) -> list[str]:
    """Lines that load an adapter folder on its base model.

    Args:
        recipe: of the adapter.
        labels: its classes.
        method: that of the file: lily, or any other that PEFT reads by itself.
        new_head: the base model's own head has another size.
    """
    auto, model, hub = AUTO_CLASSES[recipe.task], recipe.model, on_hub(recipe.model)
    quantized = QUANTIZED[model.quantization]
    at_path = hub is None and model.path is not None and model.format == "transformers" and method != "lily"
    reasons = [*(["lets PEFT read this adapter"] if method == "lily" else []),
               *(["finds its base model"] if hub is None and not at_path else [])]  # fmt: skip
    if hub is not None:
        source, place = f"source = {hub[0]!r}", f"source, revision={hub[1]!r}" if hub[1] else "source"
    else:
        found = "PeftConfig.from_pretrained(folder).base_model_name_or_path" if at_path else "lily.base_model(folder)"
        source, place = f"source = {found}", "source"
    place += CODE if model.trust_remote_code else ""
    options = [*_head(recipe, labels), *(["ignore_mismatched_sizes=True"] if new_head else []),
               *([f'dtype="{model.dtype}"'] if model.dtype != "auto" else []),
               *([f"quantization_config={quantized}"] if quantized else [])]  # fmt: skip
    return [
        *(["import json", ""] if len(labels or ()) > MANY else []),
        *([f"import lily  # {' and '.join(reasons)}"] if reasons else []),
        f"from peft import {'PeftConfig, PeftModel' if at_path else 'PeftModel'}",
        f"from transformers import {', '.join([*_names(recipe), *(['BitsAndBytesConfig'] if quantized else [])])}",
        *_custom(recipe),
        "",
        HERE,
        source,
        *_labels(labels),
        *_call(f"base = {auto}.from_pretrained", place, options),
        "model = PeftModel.from_pretrained(base, folder).eval()",
        *_use(recipe, place),
    ]


def merged_lines(recipe: Recipe, labels: Sequence[str] | None) -> list[str]:
    """Lines that load a merged model, which brings its classes and its tokenizer."""
    auto, code = AUTO_CLASSES[recipe.task], CODE if recipe.model.trust_remote_code else ""
    return [
        f"from transformers import {', '.join(_names(recipe))}",
        *_custom(recipe),
        "",
        HERE,
        f'model = {auto}.from_pretrained(folder{code}, dtype="auto").eval()',
        *_use(recipe, f"folder{code}"),
    ]


def _names(recipe: Recipe) -> list[str]:
    return [AUTO_CLASSES[recipe.task], *(["AutoTokenizer"] if recipe.task != "image-classification" else [])]


def _custom(recipe: Recipe) -> list[str]:
    """The import of a model that this package defines."""
    model = recipe.model
    defined = (model.architecture or {}).get("model_type") == "vision_mamba" or (model.standin or "").startswith("vim")
    return ["", "import lily.recipes.offline.vision_mamba  # a model that is defined there"] if defined else []


def _labels(labels: Sequence[str] | None) -> list[str]:
    if labels is None:
        return []
    if len(labels) > MANY:
        return ['labels = json.load(open(f"{folder}/labels.json", encoding="utf-8"))']
    return [f"labels = {list(labels)!r}"]


def _head(recipe: Recipe, labels: Sequence[str] | None) -> list[str]:
    if recipe.task == "text-regression":
        return ["num_labels=1", 'problem_type="regression"']
    if labels is None:
        return []
    ids = "label2id={name: i for i, name in enumerate(labels)}"
    return [f"num_labels={len(labels)}", "id2label=dict(enumerate(labels))", ids]


def _call(function: str, first: str, options: Sequence[str]) -> list[str]:
    one = f"{function}({', '.join([first, *options])})"
    return [one] if len(one) <= 100 else [f"{function}(", f"    {first},", *(f"    {o}," for o in options), ")"]


def _use(recipe: Recipe, source: str) -> list[str]:
    """An answer to one text."""
    if recipe.task == "image-classification":
        return []
    lines = [f"tokenizer = AutoTokenizer.from_pretrained({source})"]
    if recipe.task == "sft":
        return [*lines, "", *_answer(recipe)]
    columns = recipe.data.columns
    texts = '"A first text.", "A second text."' if columns.text_pair is not None else '"A text."'
    batch = f'batch = tokenizer({texts}, truncation=True, max_length={recipe.data.max_length}, return_tensors="pt")'
    shown = "float(logits)" if recipe.task == "text-regression" else "model.config.id2label[int(logits.argmax())]"
    return [*lines, "", batch, "logits = model(**batch).logits", f"print({shown})"]


def _answer(recipe: Recipe) -> list[str]:
    limit = recipe.generation.max_new_tokens
    if recipe.data.template is not None:
        prompt = [f'prompt = {recipe.data.template!r}.replace("{{prompt}}", "A question.")']
        added = ""
    elif recipe.data.chat:
        prompt = [
            'prompt = "A question."',
            "if tokenizer.chat_template:",
            '    messages = [{"role": "user", "content": prompt}]',
            "    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)",
        ]
        added = ", add_special_tokens=not tokenizer.chat_template"
    else:
        prompt, added = ['prompt = "A question."'], ""
    return [
        *prompt,
        f'batch = tokenizer(prompt{added}, return_tensors="pt", return_token_type_ids=False)',
        f"answer = model.generate(**batch, max_new_tokens={limit}, do_sample=False)[0]",
        'print(tokenizer.decode(answer[batch["input_ids"].shape[1] :], skip_special_tokens=True))',
    ]
