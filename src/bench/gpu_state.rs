//! What makes two GPUs of one name differ: form factor, power limit and clocks.

use std::process::{Command, Stdio};

/// Limits that someone may have set on a GPU; what is not known is none.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct GpuState {
    /// Power limit in watts.
    pub power_limit_w: Option<f64>,
    /// The power limit that it came with.
    pub default_power_limit_w: Option<f64>,
    /// Clock that applications get, in MHz.
    pub clock_mhz: Option<f64>,
    /// Highest clock, in MHz.
    pub max_clock_mhz: Option<f64>,
}

impl GpuState {
    /// Asks `nvidia-smi` about the GPU of a PCI address; knows nothing where that is not installed.
    pub fn read(pci_address: &str) -> Self {
        let output = Command::new("nvidia-smi")
            .args([
                "--query-gpu=power.limit,power.default_limit,clocks.applications.graphics,clocks.max.graphics",
                "--format=csv,noheader,nounits",
                "--id",
                pci_address,
            ])
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .output();
        match output {
            Ok(output) if output.status.success() => {
                Self::parse(&String::from_utf8_lossy(&output.stdout))
            }
            _ => Self::default(),
        }
    }

    /// Reads a line such as `700.00, 700.00, 1980, [N/A]`.
    fn parse(line: &str) -> Self {
        let mut fields = line.split(',').map(|field| field.trim().parse().ok());
        let mut next = || fields.next().flatten();
        Self {
            power_limit_w: next(),
            default_power_limit_w: next(),
            clock_mhz: next(),
            max_clock_mhz: next(),
        }
    }

    /// The known limits in words.
    pub fn describe(&self) -> String {
        let power = self
            .power_limit_w
            .map(|watts| format!(", power limit {watts:.0} W"));
        let clock = self
            .clock_mhz
            .or(self.max_clock_mhz)
            .map(|mhz| format!(", up to {mhz:.0} MHz"));
        [power, clock].into_iter().flatten().collect()
    }

    /// Why this GPU may be slower than others of its kind, whose driver calls it `name`.
    pub fn warnings(&self, name: &str) -> Vec<String> {
        /// A limit that is lower by less is not worth a word.
        const TOLERANCE: f64 = 0.02;
        let lowered = |value: Option<f64>, most: Option<f64>| {
            let (value, most) = (value?, most?);
            (value < most * (1.0 - TOLERANCE)).then_some((value, most))
        };
        let mut warnings = Vec::new();
        if let Some(form) = ["PCIe", "NVL"].into_iter().find(|form| name.contains(form)) {
            warnings.push(format!(
                "{name} has the {form} form factor; numbers of the SXM form, with more power and other memory, do not compare"
            ));
        }
        if let Some((watts, most)) = lowered(self.power_limit_w, self.default_power_limit_w) {
            warnings.push(format!(
                "the GPU's power limit is {watts:.0} W, it came with {most:.0} W"
            ));
        }
        if let Some((mhz, most)) = lowered(self.clock_mhz, self.max_clock_mhz) {
            warnings.push(format!(
                "the GPU's clock is limited to {mhz:.0} of {most:.0} MHz"
            ));
        }
        warnings
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gpu_as_it_came() {
        let state = GpuState::parse("700.00, 700.00, 1980, 1980\n");
        assert_eq!(state.describe(), ", power limit 700 W, up to 1980 MHz");
        assert_eq!(
            state.warnings("NVIDIA H100 80GB HBM3"),
            Vec::<String>::new()
        );
    }

    #[test]
    fn limits_and_form_are_named() {
        let state = GpuState::parse("310.00, 350.00, 1200, 1755");
        let warnings = state.warnings("NVIDIA H100 PCIe");
        assert_eq!(warnings.len(), 3, "{warnings:?}");
        assert!(warnings[0].contains("PCIe form factor"));
        assert_eq!(
            warnings[1..],
            [
                "the GPU's power limit is 310 W, it came with 350 W",
                "the GPU's clock is limited to 1200 of 1755 MHz"
            ]
        );
    }

    #[test]
    fn what_is_not_known_is_not_said() {
        let state = GpuState::parse("[N/A], 700.00, [N/A], 1980");
        assert_eq!(state.power_limit_w, None);
        assert_eq!(state.describe(), ", up to 1980 MHz");
        assert_eq!(state.warnings("NVIDIA H200"), Vec::<String>::new());
        assert_eq!(GpuState::parse(""), GpuState::default());
        assert_eq!(GpuState::default().describe(), "");
    }
}
