//! Conversations as the model was trained to see them.
//!
//! A model file carries its template as Jinja source. Rather than interpret Jinja, the few formats in use are recognised by
//! their markers and written directly. Input: the template's text and messages. Output: token ids, in which only the
//! template's own markers are special tokens: a user who types `<|im_end|>` gets plain text.

use crate::tokenizer::Tokenizer;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

/// One turn of a conversation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Message<'a> {
    /// `system`, `user` or `assistant`.
    pub role: &'a str,
    /// What was said.
    pub content: &'a str,
}

/// A conversation format.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ChatTemplate {
    /// `<|im_start|>role\ncontent<|im_end|>\n` for each message.
    ChatMl {
        /// System message that comes first when the conversation has none of its own.
        default_system: Option<String>,
    },
    /// `<s>[INST] <<SYS>>\nsystem\n<</SYS>>\n\nuser [/INST] reply </s>`, with all but `<s>` and `</s>` plain text.
    Llama2,
    /// `<|start_header_id|>role<|end_header_id|>\n\ncontent<|eot_id|>` for each message.
    Llama3 {
        /// What the system message of Llama 3.1 and later begins with, also where the conversation has none.
        preamble: Option<String>,
    },
    /// `<|role|>\ncontent`, the end-of-text token and a line break for each message. Zephyr, TinyLlama.
    Zephyr,
    /// `<start_of_turn>role\ncontent<end_of_turn>\n`; the assistant is `model`, and a system message opens the first turn.
    Gemma,
    /// The file has a template in a format not known here; plain prompts still work.
    Unrecognised,
}

/// Why a conversation cannot be written.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ChatError {
    /// The template is [`ChatTemplate::Unrecognised`].
    #[error("the model's chat template is in a format not known here (known: {known}); give a plain prompt instead", known = ChatTemplate::SUPPORTED)]
    Unrecognised,
    /// The vocabulary lacks a marker of the template.
    #[error(
        "the chat template needs the special token {marker}, which the vocabulary lacks; give a plain prompt instead"
    )]
    MissingMarker {
        /// Text of the marker.
        marker: &'static str,
    },
}

const IM_START: &str = "<|im_start|>";
const IM_END: &str = "<|im_end|>";
const START_HEADER: &str = "<|start_header_id|>";
const END_HEADER: &str = "<|end_header_id|>";
const EOT: &str = "<|eot_id|>";
const START_OF_TURN: &str = "<start_of_turn>";
const END_OF_TURN: &str = "<end_of_turn>";
/// What Llama 3.1's template says of time when it is not told the date.
const LLAMA31_PREAMBLE: &str = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n";

/// A written conversation, stretch by stretch.
#[derive(Default)]
struct Script(Vec<Segment>);

enum Segment {
    /// A special token that the vocabulary must have.
    Marker(&'static str),
    /// A special token, or plain text where the vocabulary has no such token.
    MarkerOrText(&'static str),
    /// The token that begins a text.
    Bos,
    /// The token that ends a text.
    Eos,
    Text(String),
}

impl Script {
    fn marker(&mut self, marker: &'static str) {
        self.0.push(Segment::Marker(marker));
    }

    fn text(&mut self, parts: &[&str]) {
        self.0.push(Segment::Text(parts.concat()));
    }
}

impl ChatTemplate {
    /// Names of the known formats, for messages.
    pub const SUPPORTED: &'static str = "ChatML, Llama 2, Llama 3, Zephyr, Gemma";

    /// The format that the Jinja source `template` writes.
    pub fn recognise(template: &str) -> Self {
        let has = |text: &str| template.contains(text);
        if has(IM_START) && has(IM_END) {
            ChatTemplate::ChatMl { default_system: chatml_default_system(template) }
        } else if has(START_HEADER) && has(END_HEADER) && has(EOT) {
            let is_dated = has("Cutting Knowledge Date: December 2023") && has("26 Jul 2024");
            ChatTemplate::Llama3 { preamble: is_dated.then(|| LLAMA31_PREAMBLE.to_string()) }
        } else if has(START_OF_TURN) && has(END_OF_TURN) {
            ChatTemplate::Gemma
        } else if has("[INST]") && has("<<SYS>>") {
            ChatTemplate::Llama2
        } else if has("<|user|>") && has("<|assistant|>") && has("eos_token") && !has("<|end|>") {
            ChatTemplate::Zephyr
        } else {
            ChatTemplate::Unrecognised
        }
    }

    /// The format's name, for people.
    pub fn name(&self) -> &'static str {
        match self {
            ChatTemplate::ChatMl { .. } => "ChatML",
            ChatTemplate::Llama2 => "Llama 2",
            ChatTemplate::Llama3 { .. } => "Llama 3",
            ChatTemplate::Zephyr => "Zephyr",
            ChatTemplate::Gemma => "Gemma",
            ChatTemplate::Unrecognised => "unrecognised",
        }
    }

    /// The template begins with BOS whatever the tokenizer's own rule is.
    fn begins_with_bos(&self) -> bool {
        matches!(self, ChatTemplate::Llama2 | ChatTemplate::Llama3 { .. } | ChatTemplate::Gemma)
    }

    fn script(&self, messages: &[Message<'_>], reply: bool) -> Result<Script, ChatError> {
        let mut out = Script::default();
        let (system, turns) = match messages {
            [first, rest @ ..] if first.role == "system" => (Some(first.content), rest),
            all => (None, all),
        };
        match self {
            ChatTemplate::ChatMl { default_system } => {
                let mut turn = |role: &str, content: &str| {
                    out.marker(IM_START);
                    out.text(&[role, "\n", content]);
                    out.marker(IM_END);
                    out.text(&["\n"]);
                };
                let default = default_system.as_deref().filter(|_| !messages.is_empty());
                if let Some(system) = system.or(default) {
                    turn("system", system);
                }
                turns.iter().for_each(|message| turn(message.role, message.content));
                if reply {
                    out.marker(IM_START);
                    out.text(&["assistant\n"]);
                }
            }
            ChatTemplate::Llama2 => {
                let mut system = system;
                for (index, message) in turns.iter().enumerate() {
                    let content = message.content.trim();
                    if message.role == "assistant" {
                        out.text(&[" ", content, " "]);
                        out.0.push(Segment::Eos);
                        continue;
                    }
                    if index > 0 {
                        out.0.push(Segment::Bos);
                    }
                    match system.take() {
                        Some(system) => {
                            out.text(&["[INST] <<SYS>>\n", system, "\n<</SYS>>\n\n", content, " [/INST]"]);
                        }
                        None => out.text(&["[INST] ", content, " [/INST]"]),
                    }
                }
            }
            ChatTemplate::Llama3 { preamble } => {
                let header = |out: &mut Script, role: &str| {
                    out.marker(START_HEADER);
                    out.text(&[role]);
                    out.marker(END_HEADER);
                };
                let mut turn = |role: &str, parts: [&str; 2]| {
                    header(&mut out, role);
                    out.text(&["\n\n", parts[0], parts[1].trim()]);
                    out.marker(EOT);
                };
                if system.is_some() || preamble.is_some() {
                    turn("system", [preamble.as_deref().unwrap_or(""), system.unwrap_or("")]);
                }
                turns.iter().for_each(|message| turn(message.role, ["", message.content]));
                if reply {
                    header(&mut out, "assistant");
                    out.text(&["\n\n"]);
                }
            }
            ChatTemplate::Zephyr => {
                let role_marker = |role: &str| match role {
                    "system" => "<|system|>",
                    "assistant" => "<|assistant|>",
                    _ => "<|user|>",
                };
                for message in messages {
                    out.0.push(Segment::MarkerOrText(role_marker(message.role)));
                    out.text(&["\n", message.content]);
                    out.0.push(Segment::Eos);
                    out.text(&["\n"]);
                }
                if reply {
                    out.0.push(Segment::MarkerOrText(role_marker("assistant")));
                    out.text(&["\n"]);
                }
            }
            ChatTemplate::Gemma => {
                let mut system = system;
                for message in turns {
                    let role = if message.role == "assistant" { "model" } else { message.role };
                    let (before, gap) = system.take().map_or(("", ""), |system| (system, "\n\n"));
                    out.marker(START_OF_TURN);
                    out.text(&[role, "\n", before, gap, message.content.trim()]);
                    out.marker(END_OF_TURN);
                    out.text(&["\n"]);
                }
                if reply {
                    out.marker(START_OF_TURN);
                    out.text(&["model\n"]);
                }
            }
            ChatTemplate::Unrecognised => return Err(ChatError::Unrecognised),
        }
        Ok(out)
    }

    /// The conversation as text, for people, without the BOS at its beginning; with `reply` the assistant's turn is opened.
    ///
    /// # Errors
    /// [`ChatError::Unrecognised`].
    pub fn render(&self, tokenizer: &Tokenizer, messages: &[Message<'_>], reply: bool) -> Result<String, ChatError> {
        let special = |id: Option<u32>| id.map_or(&[][..], |id| tokenizer.vocab().piece(id));
        let mut out = String::new();
        for segment in self.script(messages, reply)?.0 {
            match segment {
                Segment::Marker(marker) | Segment::MarkerOrText(marker) => out.push_str(marker),
                Segment::Bos => out.push_str(&String::from_utf8_lossy(special(tokenizer.special().bos))),
                Segment::Eos => out.push_str(&String::from_utf8_lossy(special(tokenizer.special().eos))),
                Segment::Text(text) => out.push_str(&text),
            }
        }
        Ok(out)
    }

    /// The conversation as token ids, BOS included where file or format ask for it; with `reply` the assistant's turn is
    /// opened. Text between two special tokens is encoded as one.
    ///
    /// # Errors
    /// [`ChatError::Unrecognised`], [`ChatError::MissingMarker`].
    pub fn encode(&self, tokenizer: &Tokenizer, messages: &[Message<'_>], reply: bool) -> Result<Vec<u32>, ChatError> {
        let script = self.script(messages, reply)?;
        let mut ids = Vec::new();
        if tokenizer.special().add_bos || self.begins_with_bos() {
            ids.extend(tokenizer.special().bos);
        }
        let mut text = String::new();
        for segment in script.0 {
            let id = match segment {
                Segment::Marker(marker) => {
                    Some(tokenizer.special_id(marker).ok_or(ChatError::MissingMarker { marker })?)
                }
                Segment::MarkerOrText(marker) => {
                    let id = tokenizer.special_id(marker);
                    if id.is_none() {
                        text.push_str(marker);
                        continue;
                    }
                    id
                }
                Segment::Bos => tokenizer.special().bos,
                Segment::Eos => tokenizer.special().eos,
                Segment::Text(more) => {
                    text.push_str(&more);
                    continue;
                }
            };
            ids.extend(tokenizer.encode(&text, false));
            text.clear();
            ids.extend(id);
        }
        ids.extend(tokenizer.encode(&text, false));
        Ok(ids)
    }
}

/// The literal that a ChatML template writes when the first message is not the system's: the text between
/// `<|im_start|>system\n` and `<|im_end|>`, at the first place where that is plain text, in a template that asks about the
/// first role (`!=` before it, or `==` with the literal in the other branch).
fn chatml_default_system(template: &str) -> Option<String> {
    let asks =
        ["!= 'system'", "!= \"system\"", "== 'system'", "== \"system\""].iter().any(|ask| template.contains(ask));
    if !asks {
        return None;
    }
    let system_after = |after: &str| {
        // Inside a Jinja string the line break may be written out or escaped.
        let after = after.strip_prefix('\n').or_else(|| after.strip_prefix("\\n"))?;
        let (system, _) = after.split_once(IM_END)?;
        let is_plain = !system.is_empty() && !system.contains(['\'', '"', '{', '}', '\\', '\n']);
        is_plain.then(|| system.to_string())
    };
    template.split("<|im_start|>system").skip(1).find_map(system_after)
}
