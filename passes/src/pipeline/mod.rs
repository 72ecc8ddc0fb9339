//! From the imported graph to step programs: the stages, in order, on one e-graph a template.

mod check;
mod clock;
mod error;
mod record;
mod report;
mod saturate;
mod settings;
mod stitch;
mod template;
mod terms;

pub use error::CompileError;
pub use record::{Recorded, RecordedStage, RecordedTemplate, StageProgram, record};
pub use report::{Compiled, StageReport, TemplateReport};
pub use settings::PassConfig;
pub use terms::Terms;

pub(crate) use saturate::saturate;
pub(crate) use terms::{Term, open_windows};

use crate::chains::fuse_chains;
use crate::egraph::TensorAnalysis;
use crate::region::{Regions, cut, reserved, select_all, whole};
use crate::rule::Stage;
use check::{check_program, check_term};
use clock::Clock;
use lathe_ir::{Both, Graph, printable};
use stitch::{Inputs, stitch};
use template::{Chosen, Template};

/// Optimises a full-sequence model.
///
/// # Errors
/// A stage does not saturate or a program is ill-typed. A model that has no step program is not
/// an error: [`Compiled::no_step`] says why.
pub fn compile(model: &Graph, config: &PassConfig) -> Result<Compiled, CompileError> {
    compile_watched(model, config, None)
}

/// What looks on while a model is compiled, one template after the other. It changes nothing.
trait Observer {
    /// A template lies in its e-graph; no rule has run.
    fn begun(&mut self, template: &Template<'_>);
    /// A stage of that template is saturated.
    fn saturated(&mut self, template: &Template<'_>, stage: Stage);
    /// Its programs are chosen.
    fn chosen(&mut self, template: &Template<'_>, chosen: &Chosen);
    /// All templates are done; these are the regions that they stand for.
    fn cut(&mut self, regions: &Regions);
}

fn compile_watched(
    model: &Graph,
    config: &PassConfig,
    mut observer: Option<&mut dyn Observer>,
) -> Result<Compiled, CompileError> {
    let mut clock = Clock::start();
    if let Some((what, name)) = reserved(model) {
        let name = printable(name);
        return Err(CompileError::Reserved { what, name });
    }
    let regions = if config.no_roll {
        whole(model)
    } else {
        cut(model)?
    };
    // Across regions: an embedding that is the head too is read in two.
    let mut shared = TensorAnalysis::default();
    shared.note_shared(model);
    clock.lap("regions");
    let mut watch = |clock: &mut Clock, see: &dyn Fn(&mut dyn Observer)| {
        if let Some(o) = observer.as_deref_mut() {
            see(o);
            clock.lap("dumps");
        }
    };
    let mut reports = Vec::new();
    let mut chosen = Vec::new();
    for (i, graph) in regions.templates.iter().enumerate() {
        let mut template = Template::new(graph, i, regions.layers_of(i), config, &shared);
        clock.lap("regions");
        watch(&mut clock, &|o| o.begun(&template));
        let mut stages = Vec::new();
        for stage in Stage::ALL {
            let mut report = template.run(stage)?;
            report.saturate = clock.lap("saturate");
            template.check(stage)?;
            clock.lap("verify");
            stages.push(report);
            watch(&mut clock, &|o| o.saturated(&template, stage));
        }
        let programs = template.choose();
        clock.lap("extract");
        for term in [&programs.steps.decode, &programs.steps.general]
            .into_iter()
            .flatten()
        {
            check_term(&template.terms, term, "extract", &template.name)?;
        }
        clock.lap("verify");
        watch(&mut clock, &|o| o.chosen(&template, &programs));
        reports.push(template.report(stages, &programs));
        chosen.push(programs);
    }
    let full: Vec<&Graph> = chosen.iter().map(|c| &c.full).collect();
    let full = stitch(&regions, &model.name, &full, Inputs::Full)?;
    let mut no_step = None;
    let mut join = |name: &str, program: fn(&Chosen) -> &Result<Term, CompileError>| {
        let terms: Result<Vec<&Graph>, &CompileError> = chosen
            .iter()
            .map(|c| program(c).as_ref().map(|term| &term.graph))
            .collect();
        match terms {
            Ok(terms) => {
                let name = format!("{}/{name}", model.name);
                stitch(&regions, &name, &terms, Inputs::Step).map(Some)
            }
            Err(e) => {
                no_step = Some(e.clone());
                Ok(None)
            }
        }
    };
    let decode = join("decode", |c| &c.steps.decode)?;
    let mut steps = Both {
        decode: decode.as_ref().map(select_all).transpose()?,
        general: join("general", |c| &c.steps.general)?,
    };
    clock.lap("stitch");
    let joined = [&steps.decode, &steps.general].into_iter().flatten();
    for program in joined.chain([&full]) {
        check_program(program, "stitch")?;
    }
    clock.lap("verify");
    if config.makes_chains() {
        for program in [&mut steps.decode, &mut steps.general]
            .into_iter()
            .flatten()
        {
            *program = fuse_chains(program)?;
            clock.lap("chains");
            check_program(program, "chains")?;
            clock.lap("verify");
        }
    }
    if let Some(o) = observer {
        o.cut(&regions);
        clock.lap("dumps");
    }
    Ok(Compiled {
        steps,
        full,
        no_step,
        templates: reports,
        phases: clock.laps(),
    })
}

/// Runs all stages on one program and returns everything that they found: for tests and tools.
///
/// # Errors
/// As [`compile`].
pub fn terms_of(graph: &Graph, config: &PassConfig) -> Result<Terms, CompileError> {
    let none = TensorAnalysis::default();
    let mut template = Template::new(graph, 0, Vec::new(), config, &none);
    for stage in Stage::ALL {
        template.run(stage)?;
    }
    Ok(template.terms)
}
