//! Prompt text to prompt tokens.

use crate::error::RunError;
use crate::generate::SHIFT_ROOM;
use crate::options::Options;
use alloc::vec::Vec;
use model::ModelDescription;
use model::chat::Message;

/// Tokens of the configured prompt, checked against the context of `context` positions.
///
/// # Errors
/// [`RunError::EmptyPrompt`], [`RunError::PromptTooLong`], [`RunError::ShiftKeepsTooMuch`], and with `chat=true` a missing or
/// unusable template.
pub fn encode(description: &ModelDescription, options: &Options, context: usize) -> Result<Vec<u32>, RunError> {
    let tokenizer = &description.tokenizer;
    let tokens = if options.chat {
        let template = description.chat_template.as_ref().ok_or(RunError::NoChatTemplate)?;
        let system = Message { role: "system", content: &options.system };
        let user = Message { role: "user", content: &options.prompt };
        let messages = if options.system.is_empty() { &[user][..] } else { &[system, user] };
        template.encode(tokenizer, messages, true)?
    } else {
        tokenizer.encode_prompt(&options.prompt, false)
    };
    if tokens.is_empty() {
        return Err(RunError::EmptyPrompt);
    }
    let model_context = description.config.seq_len as usize;
    // One position has to be left to generate into.
    if tokens.len() >= context {
        return Err(RunError::PromptTooLong { prompt_tokens: tokens.len(), context, model_context });
    }
    if let Some(keep) = options.context_shift.map(|keep| keep as usize).filter(|keep| keep + SHIFT_ROOM > context) {
        return Err(RunError::ShiftKeepsTooMuch { keep, context, model_context });
    }
    Ok(tokens)
}
