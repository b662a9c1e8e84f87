//! Words with a closed set of spellings.

use crate::{Auto, Field, Foreign, Item, Node, Reader, Scalar, nearest};

/// A word with a closed set of spellings, made by [`choice!`].
pub trait Choice: Sized + Copy + PartialEq + 'static {
    /// Every value with its spelling and doc.
    const ALL: &'static [(Self, &'static str, &'static str)];
    /// What `"auto"` means where a key may be that instead.
    const AUTO: &'static str = "";

    /// The word in the recipe.
    fn word(&self) -> &'static str {
        let known = Self::ALL.iter().find(|(value, ..)| value == self);
        known.map(|(_, word, _)| *word).expect("choice! lists every variant")
    }
}

/// Every spelling with its doc.
fn spellings<C: Choice>(auto: bool) -> impl Iterator<Item = (&'static str, &'static str)> {
    auto.then_some(("auto", C::AUTO)).into_iter().chain(C::ALL.iter().map(|(_, word, doc)| (*word, *doc)))
}

/// What each word means, as a sentence for the reference page.
fn explain<C: Choice>(auto: bool) -> String {
    let lines = spellings::<C>(auto).map(|(word, doc)| {
        let doc = doc.split_whitespace().collect::<Vec<_>>().join(" ");
        format!(" `{word}`: {doc}")
    });
    lines.collect()
}

/// `"a", "b" or "c"`.
fn words<C: Choice>(auto: bool) -> String {
    let words: Vec<String> = spellings::<C>(auto).map(|(word, _)| format!("\"{word}\"")).collect();
    match words.split_last() {
        Some((last, rest)) if !rest.is_empty() => format!("{} or {last}", rest.join(", ")),
        _ => words.concat(),
    }
}

/// A hint at the word that was meant.
fn meant<C: Choice>(word: &str, auto: bool, foreign: &Foreign) -> String {
    let words = || spellings::<C>(auto).map(|(word, _)| word);
    let meant = foreign.word(word, words()).or_else(|| nearest(word, words()));
    meant.map_or_else(String::new, |meant| format!("did you mean \"{meant}\"?"))
}

/// Reads one of the words, or reports that there is none.
fn read<C: Choice>(auto: bool, field: &Field, node: &Node, reader: &mut Reader) -> Option<Auto<C>> {
    let words = words::<C>(auto);
    let Item::String(word) = &node.item else {
        reader.wrong_type(field.name, node, &words);
        return None;
    };
    let found = C::ALL.iter().find(|(_, known, _)| known == word).map(|(choice, ..)| Auto::Fixed(*choice));
    let found = if auto && word == "auto" { Some(Auto::Auto) } else { found };
    if found.is_none() {
        let message = format!("`{}` must be {words}, found \"{word}\"", reader.dotted(field.name));
        reader.report(node, message, &meant::<C>(word, auto, reader.foreign));
    }
    found
}

impl<C: Choice> Scalar for C {
    fn kind() -> String {
        words::<C>(false)
    }

    fn explain() -> String {
        explain::<C>(false)
    }

    fn parse(field: &Field, node: &Node, reader: &mut Reader) -> Option<Self> {
        read(false, field, node, reader)?.fixed()
    }

    fn show(&self) -> String {
        format!("\"{}\"", self.word())
    }

    fn auto_kind() -> String {
        words::<C>(true)
    }

    fn auto_explain() -> String {
        explain::<C>(true)
    }

    fn parse_auto(field: &Field, node: &Node, reader: &mut Reader) -> Option<Auto<Self>> {
        read(true, field, node, reader)
    }
}

/// Declares an enum whose variants are words in the recipe; `auto` says what `"auto"` means where a key is an
/// `Auto` of it. More derives, and serde's attribute, may stand above it.
#[macro_export]
macro_rules! choice {
    (
        $(#[doc = $enum_doc:literal])*
        $(#[derive($($derive:path),* $(,)?)])?
        $(#[serde($($serde:tt)*)])?
        pub enum $Choice:ident $(, auto $auto:literal)? {
            $( $(#[doc = $doc:literal])* $Variant:ident = $word:literal, )*
        }
    ) => {
        $(#[doc = $enum_doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq $($(, $derive)*)?)]
        $(#[serde($($serde)*)])?
        pub enum $Choice {
            $( $(#[doc = $doc])* $Variant, )*
        }

        impl $crate::Choice for $Choice {
            const ALL: &'static [(Self, &'static str, &'static str)] =
                &[$( (Self::$Variant, $word, concat!($($doc),*)), )*];
            $( const AUTO: &'static str = $auto; )?
        }

        $crate::scalar_value!($Choice);
    };
}
