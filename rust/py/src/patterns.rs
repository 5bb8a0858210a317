//! Regular expressions of a file, matched in linear time: Python's own can be made to take for ever.

use pyo3::prelude::*;
use regex_lite::RegexBuilder;

use crate::errors;

/// The most bytes of a compiled expression; time is this, at most, by the length of a name.
const MOST: usize = 1 << 18;

/// Which of `paths` end with parts that match all of `pattern`.
#[pyfunction]
#[allow(clippy::needless_pass_by_value)] // the signature that Python sees
pub(crate) fn match_paths(
    py: Python<'_>,
    pattern: &str,
    paths: Vec<String>,
) -> PyResult<Vec<bool>> {
    let build = |text: &str| RegexBuilder::new(text).size_limit(MOST).build();
    // By itself first: a bracket too many must not reach the ones around it.
    let whole = build(pattern).and_then(|_| build(&format!(r"^(?:.*\.)?(?:{pattern})$")));
    let whole = whole.map_err(|error| errors::format(py, error.to_string()))?;
    Ok(py.detach(|| paths.iter().map(|path| whole.is_match(path)).collect()))
}
