"""Chat templates, each in the way of a family of models; transformers trims a line break after a
block, so those that a template writes there stand in an expression."""

_PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
_NO_THOUGHT = "<think>\n\n</think>\n\n"
_LAST_ANSWER = "{% if loop.last and m.role == 'assistant' %}"
_OFF = "{% if add_generation_prompt and enable_thinking is defined and not enable_thinking %}"
_OFF += "<think>\n\n</think>\n\n{% endif %}"

GEMMA = (
    "{{ bos_token }}{% set head, rest = '', messages %}{% if messages[0].role == 'system' %}"
    "{% set head, rest = messages[0].content + '\n\n', messages[1:] %}{% endif %}"
    "{% for m in rest %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ head if loop.first else '' }}{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
CHATML = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n"
    "{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}"
)
THINKS = CHATML.replace(  # an empty thought before the last answer, as Qwen 3
    "{{ m.content }}", _LAST_ANSWER + _NO_THOUGHT + "{% endif %}{{ m.content }}"
)
_TURN = "{{ m.content | trim }}<|eot_id|>"
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    + _TURN
    + "{% endfor %}"
    + _PROMPT.replace("<|im_start|>assistant", "<|start_header_id|>assistant<|end_header_id|>\n")
)
LLAMA2 = (
    "{% set head, rest = '', messages %}{% if messages[0].role == 'system' %}{% set head, rest ="
    " '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n', messages[1:] %}{% endif %}"
    "{% for m in rest %}{% if m.role == 'user' %}{{ bos_token }}[INST] "
    "{{ head if loop.first else '' }}{{ m.content.strip() }} [/INST]"
    "{% else %} {{ m.content.strip() }} {{ eos_token }}{% endif %}{% endfor %}"
)
FAMILIES = {
    "gemma": GEMMA,
    "chatml": CHATML + _PROMPT,
    "llama3": LLAMA3,
    "llama2": LLAMA2,
    "last apart": THINKS + _PROMPT.replace("\n{%", "\n" + _NO_THOUGHT + "{%"),
    "closes": CHATML + _PROMPT + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}",
    "marks": LLAMA3.replace(
        _TURN,
        "{% if m.role == 'assistant' %}{% generation %}"
        + f"{_TURN}{{% endgeneration %}}{{% else %}}{_TURN}{{% endif %}}",
    ),
}
# Each is wrong, or right in a way of its own.
OTHERS = {
    "refuses system": "{% if messages[0].role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}" + GEMMA,
    "drops system": LLAMA3.replace("in messages %}", "in messages if m.role != 'system' %}"),
    "thinks": THINKS + _PROMPT,
    "may think": THINKS + _PROMPT + _OFF,
    "dated": "<|im_start|>system\n{{ date_string if date_string is defined else"
    " strftime_now('%d %b %Y') }}<|im_end|>\n" + CHATML + _PROMPT,
    "shouts": LLAMA3.replace("| trim", "| upper"),
    "replaces": LLAMA3.replace("| trim", "| replace('Ho', 'Hum')"),
    "twice": LLAMA3.replace("m.content | trim", "m.content + m.content"),
    "only last ends": LLAMA3.replace(
        "<|eot_id|>",
        "{{ '<|eot_id|>' if loop.last or m.role != 'assistant' else '\n' }}",
    ),
    "no end": (CHATML + _PROMPT).replace("<|im_end|>", ""),
    "bare": "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}",
    "broken": "{{ raise_exception('no') }}",
    "empty": "",
}

# Tools in the system message, calls as JSON between tags, results in a user turn: Qwen 2.5, Hermes.
CALLS = (
    "{% if tools %}<|im_start|>system\n"
    "{% if messages[0].role == 'system' %}{{ messages[0].content + '\n\n' }}{% endif %}<tools>"
    "{% for tool in tools %}{{ '\n' + (tool | tojson) }}{% endfor %}{{ '\n</tools><|im_end|>\n' }}"
    "{% elif messages[0].role == 'system' %}<|im_start|>system\n{{ messages[0].content }}<|im_end|>"
    "\n{% endif %}{% for m in messages %}"
    "{% if m.role == 'user' or (m.role == 'system' and not loop.first) %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% elif m.role == 'assistant' %}<|im_start|>assistant\n{{ m.content or '' }}"
    "{% for call in m.tool_calls or [] %}{% set call = call.function or call %}"
    "{{ '\n' if m.content or not loop.first else '' }}<tool_call>\n"
    '{"name": "{{ call.name }}", "arguments": {{ call.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}<|im_end|>\n"
    "{% elif m.role == 'tool' %}"
    "{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user{% endif %}"
    "{{ '\n<tool_response>\n' + m.content + '\n</tool_response>' }}"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>\n{% endif %}"
    "{% endif %}{% endfor %}" + _PROMPT
)
# With the marks of transformers, from after the header to the end of turn.
MARKED_CALLS = CALLS.replace("{{ m.content or", "{% generation %}{{ m.content or").replace(
    "{% endfor %}<|im_end|>\n", "{% endfor %}<|im_end|>{% endgeneration %}{{ '\n' }}"
)
# A thought is cut out of the content, or taken from its field, and written again in answers after
# the last question, an empty one in the last answer of all: Qwen 3.
_ASKED = (
    "{% set at = namespace(asked=-1) %}{% for m in messages %}{% if m.role == 'user' and not"
    " m.content.startswith('<tool_response>') %}{% set at.asked = loop.index0 %}{% endif %}"
    "{% endfor %}"
)
_THOUGHT = (
    "{% set said, thought = m.content, m.reasoning_content or '' %}"
    "{% if not thought and '</think>' in said %}"
    "{% set thought = said.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set said = said.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.index0 > at.asked and (loop.last or thought) %}"
    "{{ '<think>\n' + thought.strip('\n') + '\n</think>\n\n' }}{% endif %}{{ said or '' }}"
)
_THINKING = _ASKED + CALLS.replace("{{ m.content or '' }}", _THOUGHT).replace(
    "if m.content or", "if said or"
)
MAY_THINK = _THINKING + _OFF
# The generation prompt opens the thought, and the answer continues it: Qwen 3 Thinking.
OPENS = _THINKING.replace(_PROMPT, _PROMPT.replace("assistant\n", "assistant\n<think>\n"))
# Thoughts of all answers are left out, also of the last: R1-Distill, later and at first.
STRIPS_OPENS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<start_of_turn>{{ m.content }}"
    "{% elif m.role == 'assistant' %}<|start_header_id|>{{ m.content.split('</think>')[-1] }}<eos>"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|><think>\n{% endif %}"
)
STRIPS = STRIPS_OPENS.replace("<think>\n", "")
# A call alone in its turn, results as JSON, tools in the first question: Llama 3.1.
_HEAD = "<|start_header_id|>{}<|end_header_id|>\n\n".format
ALONE = (
    "{{ bos_token }}{% set told, rest = '', messages %}{% if messages[0].role == 'system' %}"
    "{% set told, rest = messages[0].content | trim, messages[1:] %}{% endif %}"
    + _HEAD("system")
    + "Today: {{ strftime_now('%d %b %Y') + '\n\n' + told }}<|eot_id|>{% if tools %}"
    + _HEAD("user")
    + "{% for tool in tools %}{{ tool | tojson(indent=4) + '\n\n' }}{% endfor %}"
    "{{ rest[0].content | trim }}<|eot_id|>{% set rest = rest[1:] %}{% endif %}"
    "{% for m in rest %}{% if m.tool_calls %}{% set call = m.tool_calls[0].function %}"
    + _HEAD("assistant")
    + '{"name": "{{ call.name }}", "parameters": {{ call.arguments | tojson }}}<|eot_id|>'
    "{% elif m.role in ('tool', 'ipython') %}"
    + _HEAD("ipython")
    + "{{ m.content | tojson }}<|eot_id|>{% else %}"
    + _HEAD("{{ m.role }}")
    + "{{ m.content | trim }}<|eot_id|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}" + _HEAD("assistant") + "{% endif %}"
)
# Tools stand before the last question only, calls are a list with ids: Mistral.
LATE = (
    "{% set asked = messages | selectattr('role', 'equalto', 'user') | list %}{{ bos_token }}"
    "{% for m in messages %}{% if m.role == 'user' %}{% if tools and m == asked[-1] %}"
    "[TOOLS] {{ tools | tojson }}[/TOOLS]{% endif %}[INST] {{ m.content }}[/INST]"
    "{% elif m.tool_calls %}[CALLS] [{% for call in m.tool_calls %}"
    "{% if call.id is not defined or call.id | length != 9 %}"
    "{{ raise_exception('Tool call IDs should be 9 long') }}{% endif %}"
    '{{ (call.function | tojson)[:-1] }}, "id": "{{ call.id }}"}'
    "{{ ', ' if not loop.last else ']' + eos_token }}{% endfor %}"
    "{% elif m.role == 'assistant' %} {{ m.content | trim }}{{ eos_token }}"
    "{% elif m.role == 'tool' %}[RESULTS] {\"content\": {{ m.content }},"
    ' "call_id": "{{ m.tool_call_id }}"}[/RESULTS]{% endif %}{% endfor %}'
)
