//! Writes the synthetic models of `synthetic::gallery` as GGUF files, for checks with other programs:
//! `cargo run -p model --example write_synthetic -- DIRECTORY`.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let directory = std::env::args().nth(1).ok_or("usage: write_synthetic DIRECTORY")?;
    std::fs::create_dir_all(&directory)?;
    for (name, spec) in model::synthetic::gallery() {
        std::fs::write(format!("{directory}/{name}.gguf"), model::synthetic::gguf(&spec)?)?;
        println!("{name}: {spec}");
    }
    Ok(())
}
