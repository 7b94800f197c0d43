//! Machine code as text, for people and for filetests.

use alloc::string::String;
use core::fmt::Write;
use iced_x86::{Decoder, DecoderOptions, FastFormatter, Instruction};

/// One line per instruction: offset from the first byte in hex, then the instruction in Intel syntax.
pub fn disassemble(code: &[u8]) -> String {
    let mut text = String::new();
    let mut formatter = FastFormatter::new();
    formatter.options_mut().set_space_after_operand_separator(true);
    let mut decoder = Decoder::with_ip(64, code, 0, DecoderOptions::NONE);
    let mut instruction = Instruction::default();
    while decoder.can_decode() {
        decoder.decode_out(&mut instruction);
        let mut line = String::new();
        formatter.format(&instruction, &mut line);
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{:4x}  {line}", instruction.ip());
    }
    text
}
