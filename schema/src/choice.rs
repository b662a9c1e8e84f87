//! Words with a closed set of spellings.

use crate::{Field, Foreign, Item, Node, Reader, Scalar, nearest};

/// A word with a closed set of spellings, made by [`choice!`].
pub trait Choice: Sized + Copy + PartialEq + 'static {
    /// Every value with its spelling and doc.
    const ALL: &'static [(Self, &'static str, &'static str)];

    /// The word in the recipe.
    fn word(&self) -> &'static str {
        let known = Self::ALL.iter().find(|(value, ..)| value == self);
        known.map(|(_, word, _)| *word).expect("choice! lists every variant")
    }

    /// The value that a word means, or a hint at the nearest word.
    fn from_word(word: &str, foreign: &Foreign) -> Result<Self, String> {
        let found = Self::ALL.iter().find(|(_, known, _)| *known == word);
        found.map(|(value, ..)| *value).ok_or_else(|| {
            let words = || Self::ALL.iter().map(|(_, word, _)| *word);
            let meant = foreign.word(word, words()).or_else(|| nearest(word, words()));
            meant.map_or_else(String::new, |meant| format!("did you mean \"{meant}\"?"))
        })
    }

    /// What each word means, as a sentence for the reference page.
    fn explain() -> String {
        let lines = Self::ALL.iter().map(|(_, word, doc)| {
            let doc = doc.split_whitespace().collect::<Vec<_>>().join(" ");
            format!(" `{word}`: {doc}")
        });
        lines.collect()
    }

    /// `"a", "b" or "c"`.
    fn words() -> String {
        let words: Vec<String> = Self::ALL.iter().map(|(_, word, _)| format!("\"{word}\"")).collect();
        match words.split_last() {
            Some((last, rest)) if !rest.is_empty() => format!("{} or {last}", rest.join(", ")),
            _ => words.concat(),
        }
    }
}

impl<C: Choice> Scalar for C {
    fn kind() -> String {
        C::words()
    }

    fn explain() -> String {
        <C as Choice>::explain()
    }

    fn parse(field: &Field, node: &Node, reader: &mut Reader) -> Option<Self> {
        let words = C::words();
        let Item::String(word) = &node.item else {
            reader.wrong_type(field.name, node, &words);
            return None;
        };
        match C::from_word(word, reader.foreign) {
            Ok(choice) => Some(choice),
            Err(hint) => {
                let message = format!("`{}` must be {words}, found \"{word}\"", reader.dotted(field.name));
                reader.report(node, message, &hint);
                None
            }
        }
    }

    fn show(&self) -> String {
        format!("\"{}\"", self.word())
    }
}

/// Declares an enum whose variants are words in the recipe.
#[macro_export]
macro_rules! choice {
    (
        $(#[doc = $enum_doc:literal])*
        pub enum $Choice:ident {
            $( $(#[doc = $doc:literal])* $Variant:ident = $word:literal, )*
        }
    ) => {
        $(#[doc = $enum_doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum $Choice {
            $( $(#[doc = $doc])* $Variant, )*
        }

        impl $crate::Choice for $Choice {
            const ALL: &'static [(Self, &'static str, &'static str)] =
                &[$( (Self::$Variant, $word, concat!($($doc),*)), )*];
        }

        $crate::scalar_value!($Choice);
    };
}
