// SPDX-License-Identifier: GPL-2.0-only
//! What a command's end must be like: its exit code and what it printed.

use regex::Regex;
use serde::Deserialize;

/// An expected exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(
    untagged,
    expecting = "exit is a number from 0 to 255 or the word nonzero"
)]
pub enum Exit {
    /// This one.
    Code(u8),
    /// A word.
    Word(ExitWord),
}

/// Words for exit codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ExitWord {
    /// Any but 0.
    Nonzero,
}

impl Default for Exit {
    fn default() -> Self {
        Exit::Code(0)
    }
}

impl Exit {
    /// Whether a command may end with `code`.
    pub fn accepts(self, code: i32) -> bool {
        match self {
            Exit::Code(wanted) => code == i32::from(wanted),
            Exit::Word(ExitWord::Nonzero) => code != 0,
        }
    }
}

impl std::fmt::Display for Exit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Exit::Code(code) => write!(f, "{code}"),
            Exit::Word(ExitWord::Nonzero) => f.write_str("not 0"),
        }
    }
}

/// What text must be like. Everything given must hold.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Expect {
    /// Exactly this, blanks and newlines at the end aside.
    pub equals: Option<String>,
    /// What an earlier step saved under this name.
    pub same_as: Option<String>,
    /// Each of these somewhere in it.
    #[serde(default)]
    pub contains: Texts,
    /// Each of these regular expressions (`^` and `$` stand for lines).
    #[serde(default)]
    pub matches: Texts,
    /// None of these regular expressions.
    #[serde(default)]
    pub absent: Texts,
}

/// One text or a list of them.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(untagged, expecting = "expected a text or a list of texts")]
pub enum Texts {
    /// No text.
    #[default]
    None,
    /// One.
    One(String),
    /// Several.
    Many(Vec<String>),
}

impl Texts {
    /// The texts.
    pub fn all(&self) -> &[String] {
        match self {
            Texts::None => &[],
            Texts::One(text) => std::slice::from_ref(text),
            Texts::Many(texts) => texts,
        }
    }
}

/// A regular expression of a scenario: `^` and `$` match at lines.
pub fn pattern(text: &str) -> Result<Regex, regex::Error> {
    regex::RegexBuilder::new(text).multi_line(true).build()
}

impl Expect {
    /// The first reason why `text` is not as expected. `saved` looks up what
    /// earlier steps saved.
    pub fn unmet(&self, text: &str, saved: impl Fn(&str) -> Option<String>) -> Option<String> {
        let trimmed = text.trim_end();
        if let Some(wanted) = self.equals.as_ref().filter(|w| w.trim_end() != trimmed) {
            return Some(format!("is not {:?}", wanted.trim_end()));
        }
        if let Some(name) = &self.same_as {
            let wanted = saved(name).unwrap_or_default();
            if wanted != text.trim() {
                return Some(format!("is not what was saved as {name}: {wanted:?}"));
            }
        }
        if let Some(wanted) = self
            .contains
            .all()
            .iter()
            .find(|w| !text.contains(w.as_str()))
        {
            return Some(format!("does not contain {wanted:?}"));
        }
        let found = |text_pattern: &String| pattern(text_pattern).is_ok_and(|p| p.is_match(text));
        if let Some(wanted) = self.matches.all().iter().find(|w| !found(w)) {
            return Some(format!("does not match {wanted:?}"));
        }
        let forbidden = self.absent.all().iter().find(|w| found(w))?;
        Some(format!("matches {forbidden:?}, which must be absent"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expectations_say_what_is_not_met() {
        let saved = |name: &str| (name == "SUM").then(|| "abc".to_string());
        let expect = |yaml: &str| serde_yaml::from_str::<Expect>(yaml).unwrap();
        for (yaml, text, fails) in [
            ("equals: abc", "abc\n", false),
            ("equals: abc", "abcd\n", true),
            ("same_as: SUM", "abc\n", false),
            ("same_as: SUM", "abd\n", true),
            ("contains: [a, c]", "abc", false),
            ("contains: [a, z]", "abc", true),
            ("matches: '^b+$'", "a\nbbb\nc", false),
            ("matches: '^b+$'", "abbb", true),
            ("absent: 'b'", "acd", false),
            ("absent: 'b'", "abc", true),
        ] {
            assert_eq!(
                expect(yaml).unmet(text, saved).is_some(),
                fails,
                "{yaml} {text:?}"
            );
        }
    }

    #[test]
    fn exit_codes_are_numbers_or_nonzero() {
        let exit = |yaml: &str| serde_yaml::from_str::<Exit>(yaml).unwrap();
        assert!(exit("3").accepts(3) && !exit("3").accepts(0));
        assert!(exit("nonzero").accepts(1) && !exit("nonzero").accepts(0));
    }
}
