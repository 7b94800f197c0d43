//! A model that lies across the first 4 GiB of its disk, or is loaded again and again, runs as it does anywhere else.

mod support;

use model::synthetic::{self, Pieces, Spec};
use storage::{BlockDevice, DeviceError, check_range};
use support::Machine;

const FOUR_GIB: u64 = 1 << 32;

/// A disk of which only some pieces are not zero.
struct SparseDisk(Pieces);

impl BlockDevice for SparseDisk {
    fn len_bytes(&self) -> u64 {
        self.0.iter().map(|(offset, bytes)| offset + bytes.len() as u64).max().unwrap_or(0).next_multiple_of(512)
    }

    fn read_only(&self) -> bool {
        true
    }

    fn read(&mut self, lba: u64, buf: &mut [u8]) -> Result<(), DeviceError> {
        check_range(self.len_bytes(), lba, buf.len() as u64)?;
        buf.fill(0);
        let (start, end) = (lba * 512, lba * 512 + buf.len() as u64);
        for (offset, bytes) in &self.0 {
            let (from, to) = (start.max(*offset), end.min(offset + bytes.len() as u64));
            if from < to {
                let part = &bytes[(from - offset) as usize..(to - offset) as usize];
                buf[(from - start) as usize..(to - start) as usize].copy_from_slice(part);
            }
        }
        Ok(())
    }

    fn write(&mut self, lba: u64, _buf: &[u8]) -> Result<(), DeviceError> {
        Err(DeviceError::ReadOnly { lba })
    }

    fn flush(&mut self) -> Result<(), DeviceError> {
        Ok(())
    }
}

#[test]
fn a_model_across_four_gibibytes_gives_the_same_tokens() {
    let file = synthetic::gguf(&Spec::default()).unwrap();
    let settings = "prompt=\"once upon\" max_tokens=32";
    let expected = Machine::with_model(&file).boot(settings).report.unwrap();
    let pieces = synthetic::gguf_around(&file, FOUR_GIB).unwrap();
    let header = &pieces[0].1;
    let parsed = model::gguf::Header::parse(header, FOUR_GIB * 2).unwrap();
    let across = |t: &&model::gguf::TensorInfo| t.offset < FOUR_GIB && t.offset + t.len_bytes > FOUR_GIB;
    assert_eq!(parsed.tensors.iter().filter(across).count(), 1);
    assert!(parsed.tensors.iter().filter(|t| t.offset >= FOUR_GIB).count() > 5);
    let mut machine = Machine::with_model(&[]);
    machine.model = Some(Box::new(SparseDisk(pieces)));
    let report = machine.boot(settings).report.unwrap();
    assert_eq!(report.token_ids, expected.token_ids);
    assert!(report.model.file_bytes > FOUR_GIB);
    assert_eq!(machine.printed.matches("loading model: ").count(), 32);
}

#[test]
fn loading_in_rounds_measures_each_and_leaves_the_same_model() {
    let file = synthetic::gguf(&Spec::default()).unwrap();
    let boot = |rounds: u32| {
        let mut machine = Machine::with_model(&file);
        let settings = format!("prompt=\"once upon\" max_tokens=32 load.rounds={rounds}");
        machine.boot(&settings).report.unwrap()
    };
    let (once, again) = (boot(0), boot(3));
    assert!(once.load.unwrap().rounds.is_empty());
    assert_eq!(again.token_ids, once.token_ids);
    let rounds = again.load.unwrap().rounds;
    assert_eq!(rounds.len(), 3);
    assert!(rounds.iter().all(|round| round.mb_s > 0.0 && round.raw_mb_s > 0.0), "{rounds:?}");
}
