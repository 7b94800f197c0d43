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
    /// The file has a template in a format not known here; plain prompts still work.
    Unrecognised,
}

/// Why a conversation cannot be written.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ChatError {
    /// The template is [`ChatTemplate::Unrecognised`].
    #[error("the model's chat template is in a format not known here (known: ChatML); give a plain prompt instead")]
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

/// A stretch of a written conversation.
enum Segment {
    Marker(&'static str),
    Text(String),
}

impl ChatTemplate {
    /// The format that the Jinja source `template` writes.
    pub fn recognise(template: &str) -> Self {
        if template.contains(IM_START) && template.contains(IM_END) {
            ChatTemplate::ChatMl { default_system: chatml_default_system(template) }
        } else {
            ChatTemplate::Unrecognised
        }
    }

    fn segments(&self, messages: &[Message<'_>], reply: bool) -> Result<Vec<Segment>, ChatError> {
        let ChatTemplate::ChatMl { default_system } = self else { return Err(ChatError::Unrecognised) };
        let mut out = Vec::new();
        let mut turn = |role: &str, content: &str| {
            let text = [role, "\n", content].concat();
            out.extend([Segment::Marker(IM_START), Segment::Text(text)]);
            out.extend([Segment::Marker(IM_END), Segment::Text("\n".to_string())]);
        };
        if let Some(system) = default_system
            && messages.first().is_some_and(|first| first.role != "system")
        {
            turn("system", system);
        }
        for message in messages {
            turn(message.role, message.content);
        }
        if reply {
            out.extend([Segment::Marker(IM_START), Segment::Text("assistant\n".to_string())]);
        }
        Ok(out)
    }

    /// The conversation as text, for people; with `reply` the assistant's turn is opened.
    ///
    /// # Errors
    /// [`ChatError::Unrecognised`].
    pub fn render(&self, messages: &[Message<'_>], reply: bool) -> Result<String, ChatError> {
        let segments = self.segments(messages, reply)?;
        Ok(segments.iter().map(|s| if let Segment::Text(text) = s { text } else { s.marker() }).collect())
    }

    /// The conversation as token ids, BOS included where the file asks for it; with `reply` the assistant's turn is opened.
    ///
    /// # Errors
    /// [`ChatError::Unrecognised`], [`ChatError::MissingMarker`].
    pub fn encode(&self, tokenizer: &Tokenizer, messages: &[Message<'_>], reply: bool) -> Result<Vec<u32>, ChatError> {
        let mut ids = Vec::new();
        if tokenizer.special().add_bos {
            ids.extend(tokenizer.special().bos);
        }
        for segment in self.segments(messages, reply)? {
            match segment {
                Segment::Marker(marker) => {
                    ids.push(tokenizer.special_id(marker).ok_or(ChatError::MissingMarker { marker })?);
                }
                Segment::Text(text) => ids.extend(tokenizer.encode(text, false)),
            }
        }
        Ok(ids)
    }
}

impl Segment {
    fn marker(&self) -> &str {
        match self {
            Segment::Marker(marker) => marker,
            Segment::Text(_) => "",
        }
    }
}

/// The literal that a ChatML template writes when the first message is not the system's: the text between
/// `<|im_start|>system\n` and `<|im_end|>`, where that is plain text and the template asks about the first role.
fn chatml_default_system(template: &str) -> Option<String> {
    if !template.contains("!= 'system'") && !template.contains("!= \"system\"") {
        return None;
    }
    let (_, after) = template.split_once("<|im_start|>system")?;
    // Inside a Jinja string the line break may be written out or escaped.
    let after = after.strip_prefix('\n').or_else(|| after.strip_prefix("\\n"))?;
    let (system, _) = after.split_once(IM_END)?;
    let is_plain = !system.is_empty() && !system.contains(['\'', '"', '{', '}', '\\', '\n']);
    is_plain.then(|| system.to_string())
}
