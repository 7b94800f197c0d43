//! `bareflow` with input that is cut, damaged, too large or in the wrong place: each case with the exit code of
//! docs/FORMATS.md and words of its own, and without losing anything that was there before.

use model::gguf::{Header, Value, Writer};
use model::synthetic::{self, Spec, TokenizerKind};
use model::{ModelError, TensorType};
use snapshot_format::{DiskMedium, HEADER_BYTES};
use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use storage::{FatVolume, MemoryDisk, SECTOR_BYTES};

/// Exit codes of docs/FORMATS.md.
const SETTINGS: i32 = 3;
const MODEL: i32 = 4;
const MEMORY: i32 = 5;
const STORAGE: i32 = 6;
const READER_LEFT: i32 = 128 + 13;

/// A directory with files.
struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn with_model() -> Self {
        let folder = Self::new();
        folder.write("tiny.gguf", &tiny());
        folder
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, bytes: &[u8]) {
        std::fs::write(self.path(name), bytes).unwrap();
    }

    fn read(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.path(name)).unwrap()
    }

    fn bareflow(&self, args: &[&str]) -> Output {
        bareflow(args, self.0.path()).output().unwrap()
    }

    /// What a run that must fail with the exit code `code` writes to standard error.
    fn refused(&self, code: i32, args: &[&str]) -> String {
        refusal(code, &self.bareflow(args), args)
    }

    /// The same of `bareflow ARGS` at the end of a shell command.
    fn refused_in_shell(&self, code: i32, before: &str, args: &[&str]) -> String {
        refusal(code, &self.in_shell(before, args), args)
    }

    fn in_shell(&self, before: &str, args: &[&str]) -> Output {
        let script = format!("{before} exec \"$0\" \"$@\"");
        let mut command = Command::new("sh");
        command.args(["-c", &script, env!("CARGO_BIN_EXE_bareflow")]).args(args);
        command.current_dir(self.0.path()).output().unwrap()
    }

    /// Token ids and report of a run with `--json` that must pass, and its warnings.
    fn generates(&self, args: &[&str]) -> (serde_json::Value, String) {
        let output = self.bareflow(&[&GENERATE[..], &["--json"], args].concat());
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success(), "{args:?}: {stderr}");
        (serde_json::from_slice(&output.stdout).unwrap(), stderr)
    }
}

fn bareflow(args: &[&str], dir: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_bareflow"));
    command.args(args).current_dir(dir);
    command
}

fn refusal(code: i32, output: &Output, args: &[&str]) -> String {
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(code), "{args:?}: {stderr}");
    assert!(output.stdout.is_empty(), "{args:?} printed {}", String::from_utf8_lossy(&output.stdout));
    stderr
}

fn tiny() -> Vec<u8> {
    synthetic::gguf(&Spec::default()).unwrap()
}

const GENERATE: [&str; 10] =
    ["generate", "--model", "tiny.gguf", "--prompt", "ab", "--max-tokens", "4", "--ignore-eos", "--threads", "1"];

/// Every byte of a GGUF file at which a field of its header begins.
fn fields(file: &[u8]) -> BTreeSet<usize> {
    let (mut have, mut fields) = (0, BTreeSet::new());
    while let Err(error) = model::gguf::read(&file[..have], file.len() as u64) {
        let ModelError::Truncated { need_bytes, at_byte, .. } = error else { panic!("{error}") };
        fields.insert(at_byte as usize);
        have = need_bytes as usize;
    }
    fields
}

#[test]
fn a_file_that_ends_at_or_inside_any_field_of_its_header_is_refused() {
    let folder = Folder::new();
    let file = synthetic::gguf(&Spec { n_layers: 1, ..Spec::default() }).unwrap();
    let fields = fields(&file);
    let last = *fields.last().unwrap();
    assert!(fields.len() > 100, "{} fields", fields.len());
    // Of arrays of texts every tenth field, of all else every one; at their first byte and inside.
    let tokens = file.windows(21).position(|bytes| bytes == b"tokenizer.ggml.tokens").unwrap();
    let directory = file.windows(12).position(|bytes| bytes == b"output_norm.").unwrap();
    let chosen = fields.iter().enumerate().filter(|(i, at)| !(tokens..directory).contains(at) || i % 20 == 0);
    let mut cuts: BTreeSet<usize> = chosen.flat_map(|(_, &at)| [at, (at + 2).min(last)]).collect();
    cuts.remove(&0);
    assert!(cuts.len() > 100, "{} cuts", cuts.len());
    for cut in cuts {
        folder.write("cut.gguf", &file[..cut]);
        let error = folder.refused(MODEL, &["generate", "--model", "cut.gguf", "--threads", "1"]);
        if cut < 4 {
            assert!(error.contains("not a model file") || error.contains("the file ends early"), "{cut}: {error}");
            continue;
        }
        let says = |word: &str| assert!(error.contains(word), "cut at {cut}: no `{word}`: {error}");
        says("the file ends early");
        says(&format!("it has {cut}; download it again"));
    }
}

#[test]
fn a_file_that_ends_inside_its_last_tensor_is_refused_with_the_numbers() {
    let folder = Folder::new();
    let file = tiny();
    // Also where the missing bytes are fewer than a sector, which a disk would fill up with zeros.
    for missing in [1, 100, 511, 512, 5000] {
        let cut = file.len() - missing;
        folder.write("cut.gguf", &file[..cut]);
        let error = folder.refused(MODEL, &["generate", "--model", "cut.gguf", "--threads", "1"]);
        let says = |word: &str| assert!(error.contains(word), "{missing} missing: no `{word}`: {error}");
        says(&format!("but the file has {cut}; download it again"));
    }
    let spec = Spec { tokenizer: TokenizerKind::SentencePiece, ..Spec::default() };
    let synthetic::Llama2cFiles { model, tokenizer } = synthetic::llama2c(&spec).unwrap();
    folder.write("tok.bin", &tokenizer);
    // Version 0 ends in tables of angles that nobody reads.
    for missing in [512, 5000] {
        let cut = model.len() - missing;
        folder.write("cut.bin", &model[..cut]);
        let error = folder.refused(MODEL, &["generate", "--model", "cut.bin", "--tokenizer", "tok.bin"]);
        assert!(error.contains(&format!("{cut}")) && error.contains(&format!("{}", model.len())), "{error}");
    }
}

/// `file` with what `metadata` and `dims` make of it; tensors keep their bytes as far as they fit.
fn rewritten(
    file: &[u8],
    metadata: impl Fn(&str, Value<'static>) -> Value<'static>,
    dims: impl Fn(&str, &mut Vec<u64>),
) -> Vec<u8> {
    let source: &'static [u8] = file.to_vec().leak();
    let header = Header::parse(source, source.len() as u64).unwrap();
    let mut writer = Writer::new();
    for (key, value) in header.metadata.iter() {
        writer.set(key, metadata(key, value)).unwrap();
    }
    let mut data = Vec::new();
    for info in &header.tensors {
        let mut shape = info.dims[..info.n_dims].to_vec();
        dims(info.name, &mut shape);
        let index = writer.tensor(info.name, &shape, info.ty).unwrap();
        let mut bytes = source[info.offset as usize..][..info.len_bytes as usize].to_vec();
        bytes.resize(writer.tensor_bytes(index) as usize, 0);
        data.push(bytes);
    }
    writer.file(|index| &data[index]).unwrap()
}

#[test]
fn dimensions_that_the_file_or_the_configuration_does_not_have_room_for_are_refused() {
    let folder = Folder::new();
    let file = tiny();
    // In the directory: the name, the number of dimensions, then the first of them.
    let name = b"blk.0.ffn_down.weight";
    let at = file.windows(name.len()).position(|bytes| bytes == name).unwrap() + name.len() + 4;
    for (dim, words) in [
        (1u64 << 40, ["blk.0.ffn_down.weight", "but the file has"]),
        (u64::MAX, ["blk.0.ffn_down.weight", "product below 2^64"]),
        (0, ["blk.0.ffn_down.weight", "above 0"]),
    ] {
        let mut file = file.clone();
        file[at..at + 8].copy_from_slice(&dim.to_le_bytes());
        folder.write("dims.gguf", &file);
        let error = folder.refused(MODEL, &["generate", "--model", "dims.gguf"]);
        for word in words {
            assert!(error.contains(word), "{dim}: no `{word}`: {error}");
        }
    }
    let wider = rewritten(
        &file,
        |_, value| value,
        |name, dims| {
            if name == "blk.0.ffn_down.weight" {
                dims[0] += 32;
            }
        },
    );
    folder.write("dims.gguf", &wider);
    let error = folder.refused(MODEL, &["generate", "--model", "dims.gguf"]);
    assert!(error.contains("blk.0.ffn_down.weight") && error.contains("the configuration calls for"), "{error}");
}

#[test]
fn ids_outside_the_vocabulary_are_refused_wherever_they_come_from() {
    let folder = Folder::new();
    let file = tiny();
    let vocab_size = Spec::default().config().vocab_size;
    for (key, name) in [("tokenizer.ggml.bos_token_id", "bos"), ("tokenizer.ggml.eos_token_id", "eos")] {
        // 4294967295 says that there is none.
        for id in [vocab_size, u32::MAX - 1] {
            let changed = rewritten(&file, |k, value| if k == key { Value::U32(id) } else { value }, |_, _| {});
            assert_ne!(changed, file, "{key} is not in the file");
            folder.write("ids.gguf", &changed);
            let error = folder.refused(MODEL, &["generate", "--model", "ids.gguf"]);
            let words = format!("special token `{name}` has id {id}, the vocabulary has {vocab_size} tokens");
            assert!(error.contains(&words), "{error}");
        }
    }
    // A tokenizer with an id that the embedding has no row for.
    let fewer = rewritten(
        &file,
        |_, value| value,
        |name, dims| {
            if name == "token_embd.weight" || name == "output.weight" {
                dims[1] -= 1;
            }
        },
    );
    folder.write("ids.gguf", &fewer);
    let error = folder.refused(MODEL, &["generate", "--model", "ids.gguf"]);
    assert!(error.contains("token_embd.weight") && error.contains(&format!("{vocab_size}")), "{error}");
}

#[test]
fn a_model_larger_than_the_memory_of_the_process_is_refused_with_the_numbers() {
    let folder = Folder::new();
    // 100 MiB of weights.
    let spec = Spec {
        dim: 512,
        hidden_dim: 1408,
        n_heads: 8,
        n_kv_heads: 8,
        head_dim: 64,
        n_layers: 8,
        matrices: TensorType::F32,
        ..Spec::default()
    };
    folder.write("large.gguf", &synthetic::gguf(&spec).unwrap());
    let args = ["generate", "--model", "large.gguf", "--threads", "1", "--max-tokens", "2", "--prompt", "ab"];
    let output = folder.bareflow(&args);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let mut refused_for_weights = 0;
    // From hardly enough to start to nearly enough to run: never a crash.
    for mib in (60..=120).step_by(2).chain((140..=400).step_by(20)) {
        let output = folder.in_shell(&format!("ulimit -v {};", mib << 10), &args);
        let stderr = String::from_utf8_lossy(&output.stderr);
        if output.status.success() {
            assert!(mib >= 200, "{mib} MiB cannot be enough");
            continue;
        }
        assert_eq!(output.status.code(), Some(MEMORY), "{mib} MiB: {stderr}");
        assert!(stderr.contains("error: not enough memory for "), "{mib} MiB: {stderr}");
        assert!(stderr.contains(&format!("this process may use {} bytes", mib << 20)), "{mib} MiB: {stderr}");
        let numbers = stderr.split_once("not enough memory for ").unwrap().1;
        let number = |before: &str| -> u64 {
            let words: Vec<&str> = numbers.split([' ', ';', ',']).collect();
            let at = words.iter().position(|word| *word == before).unwrap();
            words[at - 1].parse().unwrap()
        };
        let (need, free) = (number("bytes"), number("free"));
        assert!(need > free && free < mib << 20, "{mib} MiB: {stderr}");
        if numbers.starts_with("weights") {
            assert!(need > 90 << 20, "{stderr}");
            refused_for_weights += 1;
        }
    }
    assert!(refused_for_weights > 2, "refused for its weights {refused_for_weights} times");
    let error = folder.refused_in_shell(MEMORY, "ulimit -d 131072;", &args);
    assert!(error.contains("not enough memory for weights"), "{error}");
}

#[test]
fn prompts_that_do_not_fit_are_refused() {
    let folder = Folder::with_model();
    let run = ["generate", "--model", "tiny.gguf", "--context", "16", "--prompt"];
    let error = folder.refused(SETTINGS, &[&run[..], &[""]].concat());
    assert!(error.contains("the prompt is empty") && error.contains("at least one character"), "{error}");
    let error = folder.refused(SETTINGS, &[&run[..], &["abcdefghijklmnopqrstuvwxyz"]].concat());
    assert!(error.contains("the context has room for 16") && error.contains("raise context="), "{error}");
}

#[test]
fn a_reader_that_leaves_ends_the_output_quietly() {
    let folder = Folder::with_model();
    for args in [&GENERATE[..], &["info", "tiny.gguf"], &["info", "tiny.gguf", "--json"], &["limits", "--json"]] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let output = bareflow(args, folder.0.path()).stdout(writer).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(READER_LEFT), "{args:?}: {said}");
        assert!(!said.contains("error"), "{args:?}: {said}");
    }
}

/// A run that writes to a full device is told so and does not panic; what it computed it computed.
#[test]
fn a_full_standard_output_is_an_error_of_storage() {
    let folder = Folder::with_model();
    for (args, snapshot) in [
        (&GENERATE[..], false),
        (&[&GENERATE[..], &["--json", "--snapshot", "kernels.img"]].concat(), true),
        (&["info", "tiny.gguf"], false),
        (&["info", "tiny.gguf", "--json"], false),
        (&["convert", "tiny.gguf", "q.gguf", "--type", "Q8_0"], false),
    ] {
        let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
        let output = bareflow(args, folder.0.path()).stdout(full).output().unwrap();
        let error = refusal(STORAGE, &output, args);
        assert!(error.contains("writing standard output: No space left on device"), "{args:?}: {error}");
        if snapshot {
            let mut disk = MemoryDisk::new(folder.read("kernels.img"));
            let (opened, _) = snapshot_format::open_any(&mut DiskMedium::open(&mut disk).unwrap()).unwrap();
            assert_eq!(opened.snapshot.boot_count, 1, "what was learnt is kept");
        }
    }
    // And where nobody can be told.
    let full = || Stdio::from(std::fs::File::options().write(true).open("/dev/full").unwrap());
    let output = bareflow(&GENERATE, folder.0.path()).stderr(full()).output().unwrap();
    assert!(output.status.success() && !output.stdout.is_empty(), "{output:?}");
    let output = bareflow(&["info", "none.gguf"], folder.0.path()).stderr(full()).output().unwrap();
    assert_eq!(output.status.code(), Some(STORAGE));
}

#[test]
fn outputs_on_a_full_device_are_named() {
    let folder = Folder::with_model();
    folder.write("text", "abc def ghi jkl mno pqr stu vwx yz. ".repeat(8).as_bytes());
    let args = ["perplexity", "tiny.gguf", "text", "--context", "16", "--threads", "1", "--logits", "/dev/full"];
    let output = folder.bareflow(&args);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(STORAGE), "{stderr}");
    assert!(stderr.contains("writing /dev/full: No space left on device"), "{stderr}");
    assert!(String::from_utf8_lossy(&output.stdout).starts_with("perplexity "), "the score is not lost: {output:?}");
}

#[test]
fn a_snapshot_that_is_no_volume_is_said_and_the_run_goes_on() {
    let folder = Folder::with_model();
    let (expected, _) = folder.generates(&[]);
    folder.write("noise.img", &[0xa5; 1 << 16]);
    for image in ["/dev/full", "noise.img"] {
        let (json, stderr) = folder.generates(&["--snapshot", image]);
        assert_eq!(json["token_ids"], expected["token_ids"]);
        assert!(stderr.contains("the boot volume cannot be used"), "{image}: {stderr}");
        let status = &json["report"]["snapshot"];
        assert!(status["reason"].as_str().unwrap().contains("cannot be used"), "{image}: {status}");
    }
    assert_eq!(folder.read("noise.img"), [0xa5; 1 << 16], "a file that is no image of ours was changed");
}

/// A snapshot image on which one run has left a snapshot, in slot A.
fn with_snapshot() -> Folder {
    let folder = Folder::with_model();
    folder.generates(&["--snapshot", "kernels.img"]);
    folder
}

/// Where a file of the volume begins in its image.
fn offset_of(image: &[u8], name: &str) -> usize {
    let mut disk = MemoryDisk::new(image.to_vec());
    let volume = FatVolume::open(&mut disk).unwrap();
    let file = volume.find(&mut disk, name).unwrap();
    assert_eq!(file.extents.len(), 1);
    file.extents[0].lba as usize * SECTOR_BYTES
}

#[test]
fn a_snapshot_that_does_not_fit_its_slot_is_said_and_the_one_before_is_kept() {
    let folder = with_snapshot();
    let mut image = folder.read("kernels.img");
    // The next save goes to slot B: its file ends after one sector, which has no room for a payload.
    let entry = image.windows(11).position(|bytes| bytes == b"SNAPB   BIN").unwrap();
    image[entry + 28..entry + 32].copy_from_slice(&512u32.to_le_bytes());
    folder.write("kernels.img", &image);
    let (json, stderr) = folder.generates(&["--snapshot", "kernels.img"]);
    assert!(stderr.contains("snapshot not saved: ") && stderr.contains("SNAPB.BIN has 512"), "{stderr}");
    assert!(stderr.contains("larger slots"), "{stderr}");
    let status = &json["report"]["snapshot"];
    assert_eq!((&status["generation_loaded"], &status["generation_saved"]), (&1.into(), &serde_json::Value::Null));
    assert!(folder.read("kernels.img") == image, "a save that does not fit wrote something");
}

#[test]
fn a_read_only_snapshot_is_used_and_left_as_it_is() {
    let folder = with_snapshot();
    let image = folder.read("kernels.img");
    std::fs::set_permissions(folder.path("kernels.img"), std::fs::Permissions::from_mode(0o444)).unwrap();
    let (json, stderr) = folder.generates(&["--snapshot", "kernels.img"]);
    assert!(stderr.contains("snapshot not saved: the boot volume is read-only"), "{stderr}");
    assert_eq!(json["report"]["snapshot"]["generation_loaded"], 1);
    assert!(folder.read("kernels.img") == image);
}

#[test]
fn a_bit_flipped_anywhere_in_the_newest_snapshot_falls_back_to_the_one_before() {
    let folder = with_snapshot();
    let (second, _) = folder.generates(&["--snapshot", "kernels.img"]);
    assert_eq!(second["report"]["snapshot"]["generation_saved"], 2);
    let payload_bytes = second["report"]["snapshot"]["saved_bytes"].as_u64().unwrap() as usize;
    let image = folder.read("kernels.img");
    let slot = offset_of(&image, "SNAPB.BIN");
    // Every field of the header (docs/FORMATS.md), its unused middle, and the payload from end to end.
    let header = [0, 4, 8, 16, 20, 24, 32, 63, 64, 96, 128, 159, 160, 300, 479, 480, 511];
    let payload = (0..16).map(|i| HEADER_BYTES + i * (payload_bytes - 1) / 15);
    for (number, at) in header.into_iter().chain(payload).enumerate() {
        let mut damaged = image.clone();
        damaged[slot + at] ^= 1 << (number % 8);
        folder.write("damaged.img", &damaged);
        let (json, stderr) = folder.generates(&["--snapshot", "damaged.img"]);
        assert_eq!(json["token_ids"], second["token_ids"], "byte {at}");
        let status = &json["report"]["snapshot"];
        assert_eq!(
            (&status["outcome"], &status["generation_loaded"]),
            (&"loaded".into(), &1.into()),
            "byte {at}: {status}"
        );
        assert!(stderr.contains("snapshot: the other slot was passed over: "), "byte {at}: {stderr}");
        // The damaged slot is the one that is written again, and nothing else.
        let (again, _) = folder.generates(&["--snapshot", "damaged.img"]);
        let status = &again["report"]["snapshot"];
        assert_ne!(status["generation_loaded"], 1, "byte {at}: {status}");
        assert_eq!(status["reason"], serde_json::Value::Null, "byte {at}: {status}");
    }
}

/// A script that runs in a directory of its own file system with this many KiB; `None` where that is not allowed.
fn on_a_small_disk(folder: &Folder, kib: u32, script: &str) -> Option<Output> {
    let dir = folder.path("small");
    std::fs::create_dir_all(&dir).unwrap();
    let mount = format!("mount -t tmpfs -o size={kib}k none '{}'", dir.display());
    let run = |script: &str| {
        let program = env!("CARGO_BIN_EXE_bareflow");
        Command::new("unshare").args(["-rm", "sh", "-c", script, program]).current_dir(folder.0.path()).output()
    };
    if !run(&mount).is_ok_and(|output| output.status.success()) {
        eprintln!("skipped: no file system can be mounted here without being root");
        return None;
    }
    Some(run(&format!("{mount} || exit 99; {script}")).unwrap())
}

#[test]
fn a_full_disk_is_said_and_leaves_nothing_half_written() {
    let folder = Folder::with_model();
    let run = GENERATE.join(" ");
    // No room for the image: 8 MiB of slots alone.
    let script = format!("\"$0\" {run} --snapshot small/kernels.img; code=$?; ls -A small >&2; exit $code");
    let Some(output) = on_a_small_disk(&folder, 4096, &script) else { return };
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(STORAGE), "{stderr}");
    assert!(stderr.contains("making the snapshot image small/kernels.img"), "{stderr}");
    assert!(stderr.trim_end().ends_with("No space left on device (os error 28)"), "something is left: {stderr}");

    let script = "\"$0\" convert tiny.gguf small/q.gguf --type F32; code=$?; ls -A small >&2; exit $code";
    let output = on_a_small_disk(&folder, 16, script).unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(STORAGE), "{stderr}");
    assert!(stderr.contains("small/q.gguf: No space left on device") && stderr.lines().count() == 1, "{stderr}");

    // An image whose slots were never written has no room set aside for them.
    let script = format!(
        "\"$0\" {run} --snapshot kernels.img && cp --sparse=always kernels.img small/ && cat /dev/zero > small/rest; \
         \"$0\" {run} --snapshot small/kernels.img >&2; code=$?; cmp kernels.img small/kernels.img >&2 && exit $code"
    );
    let output = on_a_small_disk(&folder, 4096, &script).unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    assert!(stderr.contains("snapshot not saved: ") && stderr.contains("the previous snapshot is kept"), "{stderr}");
}

#[test]
fn an_output_never_replaces_an_input_and_another_file_only_when_asked() {
    let folder = Folder::with_model();
    folder.write("text", "abc def ghi jkl mno pqr stu vwx yz. ".repeat(8).as_bytes());
    std::os::unix::fs::symlink("tiny.gguf", folder.path("link.gguf")).unwrap();
    std::fs::hard_link(folder.path("tiny.gguf"), folder.path("hard.gguf")).unwrap();
    std::os::unix::fs::symlink("nowhere.gguf", folder.path("dangling.gguf")).unwrap();
    folder.write("other.gguf", b"precious");
    std::fs::set_permissions(folder.path("other.gguf"), std::fs::Permissions::from_mode(0o444)).unwrap();
    let convert = |output: &'static str| ["convert", "tiny.gguf", output, "--type", "Q8_0"];
    for output in ["tiny.gguf", "./tiny.gguf", "link.gguf", "hard.gguf"] {
        for force in [&[][..], &["--force"]] {
            let error = folder.refused(SETTINGS, &[&convert(output)[..], force].concat());
            assert!(error.contains("input and output are the same file; name another output"), "{error}");
        }
    }
    for output in ["other.gguf", "dangling.gguf"] {
        let error = folder.refused(SETTINGS, &convert(output));
        assert!(error.contains(&format!("{output} is there already")) && error.contains("--force"), "{error}");
    }
    for input in ["tiny.gguf", "text"] {
        let error = folder.refused(SETTINGS, &["perplexity", "tiny.gguf", "text", "--logits", input]);
        assert!(error.contains("input and output are the same file"), "{error}");
    }
    assert_eq!((folder.read("tiny.gguf"), folder.read("other.gguf")), (tiny(), b"precious".to_vec()));
    assert!(!folder.path("nowhere.gguf").exists());
    let output = folder.bareflow(&[&convert("other.gguf")[..], &["--force"]].concat());
    assert!(output.status.success(), "{output:?}");
    assert!(Header::parse(&folder.read("other.gguf"), u64::MAX).is_ok());
}

#[test]
fn flags_that_cannot_be_taken_are_refused_before_anything_is_done() {
    let folder = Folder::with_model();
    std::fs::create_dir(folder.path("dir")).unwrap();
    for (code, args, words) in [
        (SETTINGS, &["generate", "--model", "tiny.gguf", "--threads", "99999"][..], "99999"),
        (SETTINGS, &["limits", "--threads", "99999"], "99999"),
        (SETTINGS, &["generate", "--model", "tiny.gguf", "--set", "mode=selftest"], "a process generates"),
        (SETTINGS, &["generate", "--model", "tiny.gguf", "--set", "tune.pairs=4"], "8 to 128"),
        (SETTINGS, &["bench", "--model", "tiny.gguf", "--tier", "reference"], "leave it out"),
        (SETTINGS, &["bench", "--model", "tiny.gguf", "--report"], "leave it out"),
        (SETTINGS, &["tune", "--model", "tiny.gguf", "--keys", "zzz", "--rounds", "1"], "none of the hot keys"),
        (SETTINGS, &["explain", "foo"], "`foo`"),
        (SETTINGS, &["convert", "tiny.gguf", "q.gguf", "--type", "Q9"], "unknown type `Q9`"),
        (SETTINGS, &["convert", "tiny.gguf", "q.gguf", "--embedding", "F16"], "--embedding is given without --type"),
        (SETTINGS, &["perplexity", "tiny.gguf", "tiny.gguf", "--context", "0"], "--context 0"),
        (STORAGE, &["generate", "--model", "dir"], "is a directory"),
        (STORAGE, &["tune", "--model", "tiny.gguf", "--signature", "none.sig"], "reading none.sig"),
    ] {
        let error = folder.refused(code, args);
        assert!(error.to_lowercase().contains(&words.to_lowercase()), "{args:?}: {error}");
        assert_eq!(error.matches("error:").count(), 1, "{args:?}: {error}");
    }
    // A refusal inside a run is said once, too.
    let error = folder.refused(SETTINGS, &["generate", "--model", "tiny.gguf", "--prompt", ""]);
    assert_eq!(error.matches("the prompt is empty").count(), 1, "{error}");
    // Nothing is decoded, so there is no rate.
    let output = folder.bareflow(&["generate", "--model", "tiny.gguf", "--max-tokens", "0"]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.contains("decode - tok/s"), "{said}");
}

#[test]
fn a_note_stands_on_a_line_of_its_own() {
    let folder = Folder::with_model();
    let args = ["generate", "--model", "tiny.gguf", "--prompt", "ab", "--context", "16", "--ignore-eos"];
    let output = folder.bareflow(&args);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.contains("\nwarning: the context of 16 tokens is full"), "{said}");
}
