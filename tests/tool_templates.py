"""Chat templates that write tools, calls and thoughts, each in the way of a family of models."""

# ChatML with tools in the system message, calls as JSON between tags, results in a user turn: as
# Qwen 2.5 and Hermes have it.
CALLS = """\
{%- set begun = namespace(results=false) -%}
{%- if tools -%}
  {{- '<|im_start|>system\\n' -}}
  {%- if messages[0].role == 'system' -%}{{- messages[0].content + '\\n\\n' -}}{%- endif -%}
  {{- '<tools>' -}}
  {%- for tool in tools -%}{{- '\\n' + (tool | tojson) -}}{%- endfor -%}
  {{- '\\n</tools><|im_end|>\\n' -}}
{%- elif messages[0].role == 'system' -%}
  {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' -}}
{%- endif -%}
{%- for m in messages -%}
  {%- if m.role == 'user' or (m.role == 'system' and not loop.first) -%}
    {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' -}}
  {%- elif m.role == 'assistant' -%}
    {{- '<|im_start|>assistant\\n' -}}{%- THOUGHT -%}
    {%- if m.content -%}{{- m.content -}}{%- endif -%}
    {%- for call in m.tool_calls or [] -%}
      {%- set call = call.function if call.function else call -%}
      {{- '\\n' if m.content or not loop.first else '' -}}
      {{- '<tool_call>\\n{"name": "' + call.name + '", "arguments": ' -}}
      {{- call.arguments | tojson -}}{{- '}\\n</tool_call>' -}}
    {%- endfor -%}
    {{- '<|im_end|>' -}}{%- MARK -%}{{- '\\n' -}}
  {%- elif m.role == 'tool' -%}
    {%- if loop.first or messages[loop.index0 - 1].role != 'tool' -%}
      {{- '<|im_start|>user' -}}
    {%- endif -%}
    {{- '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' -}}
    {%- if loop.last or messages[loop.index0 + 1].role != 'tool' -%}
      {{- '<|im_end|>\\n' -}}
    {%- endif -%}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""

_PLAIN = CALLS.replace("{%- THOUGHT -%}", "").replace("{%- MARK -%}", "")
# With the marks of transformers: from behind the header to the end of turn.
MARKED = CALLS.replace("{%- THOUGHT -%}", "{%- generation -%}").replace(
    "{%- MARK -%}", "{%- endgeneration -%}"
)

# The thought is cut out of the content, or taken from its field. It is written again in answers
# after the last question, an empty one in the last answer of all: as Qwen 3 has it.
_CUT = """\
    {%- set said = m.content -%}{%- set thought = m.reasoning_content or '' -%}
    {%- if not thought and '</think>' in said -%}
      {%- set thought = said.split('</think>')[0].split('<think>')[-1].strip('\\n') -%}
      {%- set said = said.split('</think>')[-1].lstrip('\\n') -%}
    {%- endif -%}"""
_ASKS = """\
{%- set at = namespace(asked=-1) -%}
{%- for m in messages -%}
  {%- if m.role == 'user' and not m.content.startswith('<tool_response>') -%}
    {%- set at.asked = loop.index0 -%}
  {%- endif -%}
{%- endfor -%}"""
_SAID = "{%- if said -%}{{- said -}}{%- endif -%}"
_WRITES = """\
    {%- if loop.index0 > at.asked and (loop.last or thought) -%}
      {{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' -}}
    {%- endif -%}"""
_THINKS = _ASKS + _PLAIN.replace(
    "{%- if m.content -%}{{- m.content -}}{%- endif -%}", _CUT + _WRITES + _SAID
).replace("if m.content or", "if said or")
MAY_THINK = (
    _THINKS
    + "{%- if add_generation_prompt and enable_thinking is defined and not enable_thinking -%}"
    "{{- '<think>\\n\\n</think>\\n\\n' -}}{%- endif -%}"
)
# The generation prompt opens the thought, and the answer goes on: as Qwen 3 Thinking has it.
OPENS = _THINKS.replace(
    "{{- '<|im_start|>assistant\\n' -}}{%- endif -%}",
    "{{- '<|im_start|>assistant\\n<think>\\n' -}}{%- endif -%}",
)
# Thoughts of all answers are left out, be it the last: as R1-Distill has it, later and at first.
STRIPS_OPENS = """\
{{- bos_token -}}
{%- for m in messages -%}
  {%- if m.role == 'user' -%}{{- '<start_of_turn>' + m.content -}}
  {%- elif m.role == 'assistant' -%}
    {%- set said = m.content.split('</think>')[-1] -%}
    {{- '<|start_header_id|>' + said + '<eos>' -}}
  {%- else -%}{{- m.content -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|><think>\\n' -}}{%- endif -%}"""
STRIPS = STRIPS_OPENS.replace("<think>\\n", "")

# A call alone in its turn, results as JSON, tools in the first question: as Llama 3.1 has it.
ALONE = """\
{{- bos_token -}}
{%- if messages[0].role == 'system' -%}
  {%- set told = messages[0].content | trim -%}{%- set rest = messages[1:] -%}
{%- else -%}{%- set told = '' -%}{%- set rest = messages -%}{%- endif -%}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' -}}
{{- 'Today: ' + strftime_now('%d %b %Y') + '\\n\\n' + told + '<|eot_id|>' -}}
{%- if tools -%}
  {{- '<|start_header_id|>user<|end_header_id|>\\n\\n' -}}
  {%- for tool in tools -%}{{- tool | tojson(indent=4) + '\\n\\n' -}}{%- endfor -%}
  {{- rest[0].content | trim + '<|eot_id|>' -}}{%- set rest = rest[1:] -%}
{%- endif -%}
{%- for m in rest -%}
  {%- if m.tool_calls -%}
    {%- if m.tool_calls | length != 1 -%}{{- raise_exception('one call at once') -}}{%- endif -%}
    {%- set call = m.tool_calls[0].function -%}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
    {{- '{"name": "' + call.name + '", "parameters": ' + call.arguments | tojson + '}' -}}
    {{- '<|eot_id|>' -}}
  {%- elif m.role in ('tool', 'ipython') -%}
    {{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' -}}
    {%- if m.content is mapping or m.content is iterable -%}{{- m.content | tojson -}}
    {%- else -%}{{- m.content -}}{%- endif -%}{{- '<|eot_id|>' -}}
  {%- else -%}
    {{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim -}}
    {{- '<|eot_id|>' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
{%- endif -%}"""

# Tools stand before the last question only, calls are a list with ids: as Mistral has it.
LATE = """\
{%- set asked = messages | selectattr('role', 'equalto', 'user') | list -%}
{{- bos_token -}}
{%- for m in messages -%}
  {%- if m.role == 'user' -%}
    {%- if tools and m == asked[-1] -%}
      {{- '[TOOLS] ' + (tools | tojson) + '[/TOOLS]' -}}
    {%- endif -%}
    {{- '[INST] ' + m.content + '[/INST]' -}}
  {%- elif m.tool_calls -%}
    {{- '[CALLS] [' -}}
    {%- for call in m.tool_calls -%}
      {%- if call.id is not defined or call.id | length != 9 -%}
        {{- raise_exception('Tool call IDs should be 9 long') -}}
      {%- endif -%}
      {{- (call.function | tojson)[:-1] + ', "id": "' + call.id + '"}' -}}
      {{- ', ' if not loop.last else ']' + eos_token -}}
    {%- endfor -%}
  {%- elif m.role == 'assistant' -%}{{- ' ' + m.content | trim + eos_token -}}
  {%- elif m.role == 'tool' -%}
    {{- '[RESULTS] {"content": ' + m.content | string + ', "call_id": "' -}}
    {{- m.tool_call_id + '"}[/RESULTS]' -}}
  {%- endif -%}
{%- endfor -%}"""

PLAIN_CALLS = _PLAIN
