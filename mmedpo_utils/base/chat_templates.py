"""Chat templates of LLaVA models, by the name that their code gives them."""

from __future__ import annotations

_TEXT = (
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in "
    "message.content if part.type == 'text' "
    "%}{{ part.text }}{% endfor %}{% endif %}"
)


_USER = (
    "{% if message.content is not string %}{% for part in message.content if part.type == 'image' "
    "%}{{ '<image>\\n' }}"
    "{% endfor %}{% endif %}"
) + _TEXT


TEMPLATES = {
    "mistral_instruct": "{{ bos_token }}{% for message in messages %}{% if message.role == "
    "'user' %}[INST] "
    + _USER
    + " [/INST]{% else %} "
    + _TEXT
    + " {{ eos_token }}{% endif %}{% endfor %}",
    "v1": "{{ bos_token }}A chat between a curious user and an artificial intelligence "
    "assistant. The assistant gives helpful, "
    "detailed, and polite answers to the user's questions. {% for message in messages %}{% if "
    "message.role == 'user' %}"
    "USER: " + _USER + " ASSISTANT:{% else %} " + _TEXT + "{{ eos_token }}{% endif %}{% endfor %}",
}
