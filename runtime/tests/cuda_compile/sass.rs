//! Machine code by NVIDIA's disassembler, which PyPI has as a package of its own.

use lathe_runtime::device::cuda::library::search_folders;
use std::path::{Path, PathBuf};
use std::process::Command;

/// One instruction, without its predicate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Instruction {
    /// Name with its suffixes, as `LDG.E.128`.
    pub(crate) op: String,
    /// The rest of the line.
    pub(crate) operands: String,
}

/// nvdisasm.
pub(crate) struct Disassembler(PathBuf);

impl Disassembler {
    /// Looks beside the folders of the CUDA libraries, then in PATH and in CUDA's usual place.
    pub(crate) fn find() -> Option<Disassembler> {
        let variable = |name| std::env::var_os(name).unwrap_or_default();
        let mut folders: Vec<PathBuf> = Vec::new();
        let libraries = std::env::split_paths(&variable("LD_LIBRARY_PATH"))
            .chain(search_folders())
            .collect::<Vec<_>>();
        folders.extend(libraries.iter().map(|lib| lib.join("../bin")));
        folders.extend(std::env::split_paths(&variable("PATH")));
        folders.push("/usr/local/cuda/bin".into());
        let program = |folder: PathBuf| folder.join("nvdisasm");
        folders
            .into_iter()
            .map(program)
            .find(|p| p.is_file())
            .map(Disassembler)
    }

    /// The instructions of a cubin, in order of their addresses.
    pub(crate) fn disassemble(&self, cubin: &[u8]) -> Vec<Instruction> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("kernel.cubin");
        std::fs::write(&path, cubin).unwrap();
        let instructions = parse(&self.run(&path));
        assert!(!instructions.is_empty(), "nvdisasm printed no instruction");
        instructions
    }

    fn run(&self, path: &Path) -> String {
        let out = Command::new(&self.0).arg("-c").arg(path).output().unwrap();
        assert!(
            out.status.success(),
            "{}: {}",
            self.0.display(),
            String::from_utf8_lossy(&out.stderr)
        );
        String::from_utf8(out.stdout).unwrap()
    }
}

/// Lines like `/*0d40*/  @!P0 LDG.E.128 R4, desc[UR6][R26.64] ;`.
fn parse(text: &str) -> Vec<Instruction> {
    let instruction = |line: &str| {
        let rest = line.trim().strip_prefix("/*")?;
        let (address, rest) = rest.split_once("*/")?;
        u64::from_str_radix(address, 16).ok()?;
        let mut rest = rest.trim();
        if rest.starts_with('@') {
            rest = rest.split_once(' ')?.1.trim();
        }
        let rest = rest.trim_end_matches(';').trim();
        let (op, operands) = rest.split_once(' ').unwrap_or((rest, ""));
        Some(Instruction {
            op: op.to_owned(),
            operands: operands.trim().to_owned(),
        })
    };
    text.lines().filter_map(instruction).collect()
}

#[test]
fn instructions_are_read_from_a_listing() {
    let text = ".text.k:\n        /*0000*/                   LDC R1, c[0x0][0x28] ;\n.L_x_1:\n\
                \x20       /*00f0*/              @!P1 LDG.E.128 R4, desc[UR6][R26.64] ;\n\
                \x20       /*0120*/                   ACQBULK ;\n\t.size k\n";
    let op = |op: &str, operands: &str| Instruction {
        op: op.into(),
        operands: operands.into(),
    };
    let expected = [
        op("LDC", "R1, c[0x0][0x28]"),
        op("LDG.E.128", "R4, desc[UR6][R26.64]"),
        op("ACQBULK", ""),
    ];
    assert_eq!(parse(text), expected);
}
