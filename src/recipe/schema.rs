//! Declares recipe tables: one macro gives a table's struct, defaults, ranges, key list, reader, writer and
//! reference page, so that none of them can disagree with another.
//!
//! serde is absent on purpose: its errors stop at the first, and know no key of another table to suggest.

use super::names;
use super::reader::Reader;
use super::source::{Item, Node};

/// A table of a recipe, made by [`table!`].
pub trait Table: Default {
    /// The doc comment.
    const DOC: &'static str;
    /// Reads `node` into the key `key`; false when this table has no such key.
    fn take(&mut self, key: &str, node: &Node, reader: &mut Reader) -> bool;
    /// Describes every key; the defaults are this value's.
    fn describe(&self) -> Vec<Key>;
    /// Writes every key as TOML into section `section` of `writer`.
    fn write(&self, section: usize, writer: &mut Writer);
}

/// Anything that can stand to the right of a key: a scalar, a list, a table, a list of tables.
pub trait Value: Sized {
    /// Replaces `self`, which holds the default, by what `node` says; reports to `reader` where it cannot.
    fn read(&mut self, field: &Field, node: &Node, reader: &mut Reader);
    /// Describes the key for the reference page and for suggestions.
    fn describe(&self, field: &Field) -> Key;
    /// Writes `name = value`; nothing when unset, unless `default` would then take effect.
    fn write(&self, name: &str, default: &Self, section: usize, writer: &mut Writer);
}

/// What [`table!`] knows about one key.
pub struct Field {
    pub name: &'static str,
    pub doc: &'static str,
    pub range: Range,
    pub required: bool,
}

/// One key as the reference page shows it.
#[derive(Debug, Clone)]
pub struct Key {
    pub name: &'static str,
    /// The field's doc comment.
    pub doc: String,
    /// "integer", "number", `"k1" | "k2"` …
    pub kind: String,
    /// "at least 0", or empty.
    pub range: String,
    /// The default as TOML; `None` when unset.
    pub default: Option<String>,
    /// Without it the recipe is refused.
    pub required: bool,
    /// The keys inside, when the key is a table.
    pub table: Option<Vec<Key>>,
    /// True for `[[name]]`.
    pub repeated: bool,
}

/// The values a number may take.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Range {
    min: f64,
    max: f64,
    above: bool,
    below: bool,
}

impl Range {
    /// Every finite number.
    pub const ANY: Range = Range { min: f64::NEG_INFINITY, max: f64::INFINITY, above: false, below: false };

    /// Whether `value` is inside; NaN and infinities never are.
    pub fn contains(&self, value: f64) -> bool {
        let low = if self.above { value > self.min } else { value >= self.min };
        let high = if self.below { value < self.max } else { value <= self.max };
        value.is_finite() && low && high
    }

    /// The range in words, or nothing when every number is allowed.
    pub fn words(&self) -> String {
        let low = if self.above { "above" } else { "at least" };
        let high = if self.below { "below" } else { "at most" };
        match (self.min.is_finite(), self.max.is_finite()) {
            (false, false) => String::new(),
            (true, false) => format!("{low} {}", self.min),
            (false, true) => format!("{high} {}", self.max),
            (true, true) => format!("{low} {} and {high} {}", self.min, self.max),
        }
    }
}

/// `min` and more.
pub const fn at_least(min: f64) -> Range {
    Range { min, ..Range::ANY }
}

/// Most rows or tokens of anything: what is computed of them stays a number.
pub const MOST: f64 = 1e9;

/// More than `min`.
pub const fn above(min: f64) -> Range {
    Range { min, above: true, ..Range::ANY }
}

/// `min` to `max`, both included.
pub const fn between(min: f64, max: f64) -> Range {
    Range { min, max, ..Range::ANY }
}

/// More than `min`, up to and with `max`.
pub const fn above_to(min: f64, max: f64) -> Range {
    Range { min, max, above: true, below: false }
}

/// `min` and more, but less than `max`.
pub const fn from_below(min: f64, max: f64) -> Range {
    Range { min, max, above: false, below: true }
}

/// Collects TOML: sections in order, each with its `key = value` lines.
#[derive(Default)]
pub struct Writer {
    sections: Vec<Section>,
}

struct Section {
    path: String,
    header: String,
    lines: Vec<String>,
}

impl Writer {
    /// Starts the root section, number 0.
    pub fn new() -> Self {
        Self { sections: vec![Section { path: String::new(), header: String::new(), lines: Vec::new() }] }
    }

    /// Adds `name = value` to a section.
    pub fn line(&mut self, section: usize, name: &str, value: &str) {
        self.sections[section].lines.push(format!("{name} = {value}"));
    }

    /// Opens `[parent.name]`, or `[[parent.name]]` when `repeated`, and gives its number.
    pub fn open(&mut self, parent: usize, name: &str, repeated: bool) -> usize {
        let parent = &self.sections[parent].path;
        let path = if parent.is_empty() { name.to_owned() } else { format!("{parent}.{name}") };
        let header = if repeated { format!("[[{path}]]") } else { format!("[{path}]") };
        self.sections.push(Section { path, header, lines: Vec::new() });
        self.sections.len() - 1
    }

    /// The text; sections without a line are left out.
    pub fn finish(self) -> String {
        let written = self.sections.into_iter().filter(|section| !section.lines.is_empty());
        let blocks = written.map(|section| {
            let header = if section.header.is_empty() { String::new() } else { section.header + "\n" };
            header + &section.lines.join("\n") + "\n"
        });
        blocks.collect::<Vec<_>>().join("\n")
    }
}

/// A whole table as TOML that loads again to the same value.
pub fn to_toml<T: Table>(table: &T) -> String {
    let mut writer = Writer::new();
    table.write(0, &mut writer);
    writer.finish()
}

/// A resolved recipe as JSON, for programs.
///
/// # Panics
/// `text` is none of [`to_toml`]'s.
pub fn json_of(text: &str) -> serde_json::Value {
    let table: toml::Table = text.parse().expect("a resolved recipe is TOML");
    serde_json::to_value(&table).expect("a table of plain values serialises")
}

/// The default of a field, or `None` when it is unset.
pub fn shown_default(field: &Field, value: Option<String>) -> Option<String> {
    value.filter(|_| !field.required)
}

impl<T: Table> Value for Vec<T> {
    fn read(&mut self, field: &Field, node: &Node, reader: &mut Reader) {
        let Item::Array(elements) = &node.item else {
            return reader.wrong_type(field.name, node, &format!("a list of tables, [[{}]]", field.name));
        };
        self.clear();
        for (index, element) in elements.iter().enumerate() {
            let mut table = T::default();
            reader.enter(field.name, |reader| reader.table(&mut table, &index.to_string(), element));
            self.push(table);
        }
    }

    fn describe(&self, field: &Field) -> Key {
        let doc = format!("{} {}", field.doc.trim(), T::DOC.trim());
        let table = Some(T::default().describe());
        let kind = String::from("list of tables");
        Key { name: field.name, doc, kind, range: String::new(), default: None, required: false, table, repeated: true }
    }

    fn write(&self, name: &str, _: &Self, section: usize, writer: &mut Writer) {
        for table in self {
            let section = writer.open(section, name, true);
            table.write(section, writer);
        }
    }
}

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
    fn from_word(word: &str) -> Result<Self, String> {
        let found = Self::ALL.iter().find(|(_, known, _)| *known == word);
        found.map(|(value, ..)| *value).ok_or_else(|| {
            let words = || Self::ALL.iter().map(|(_, word, _)| *word);
            let meant = names::foreign_word(word, words()).or_else(|| names::nearest(word, words()));
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

/// Declares a recipe table. A field without a default is required; `in` gives a number's range. The keys of an
/// `inline` table are written in this table itself, before its own keys, those of `inline_last` after them.
macro_rules! table {
    (
        $(#[doc = $table_doc:literal])*
        pub struct $Table:ident {
            $( inline $inline:ident : $Inline:ty; )*
            $(
                $(#[doc = $doc:literal])*
                pub $field:ident : $Type:ty $(= $default:expr)? $(, in $range:expr)?;
            )*
            $( inline_last $last:ident : $Last:ty; )*
        }
    ) => {
        $(#[doc = $table_doc])*
        #[derive(Debug, Clone, PartialEq)]
        pub struct $Table {
            $(
                #[doc = concat!("The keys of [`", stringify!($Inline), "`], written in this table itself.")]
                pub $inline: $Inline,
            )*
            $( $(#[doc = $doc])* pub $field: $Type, )*
            $(
                #[doc = concat!("The keys of [`", stringify!($Last), "`], written in this table itself.")]
                pub $last: $Last,
            )*
        }

        impl Default for $Table {
            fn default() -> Self {
                Self {
                    $( $inline: <$Inline>::default(), )*
                    $( $field: $crate::recipe::schema::table!(@default $($default)?), )*
                    $( $last: <$Last>::default(), )*
                }
            }
        }

        impl $crate::recipe::schema::Table for $Table {
            const DOC: &'static str = concat!($($table_doc, "\n"),*);

            fn take(
                &mut self,
                key: &str,
                node: &$crate::recipe::source::Node,
                reader: &mut $crate::recipe::reader::Reader,
            ) -> bool {
                $( if self.$inline.take(key, node, reader) { return true; } )*
                $( if self.$last.take(key, node, reader) { return true; } )*
                match key {
                    $( stringify!($field) => {
                        let field = $crate::recipe::schema::table!(@field $field [$($doc),*] [$($range)?] [$($default)?]);
                        $crate::recipe::schema::Value::read(&mut self.$field, &field, node, reader);
                        true
                    } )*
                    _ => false,
                }
            }

            fn describe(&self) -> Vec<$crate::recipe::schema::Key> {
                let mut keys = Vec::new();
                $( keys.extend($crate::recipe::schema::Table::describe(&self.$inline)); )*
                $(
                    let field = $crate::recipe::schema::table!(@field $field [$($doc),*] [$($range)?] [$($default)?]);
                    keys.push($crate::recipe::schema::Value::describe(&self.$field, &field));
                )*
                $( keys.extend($crate::recipe::schema::Table::describe(&self.$last)); )*
                keys
            }

            fn write(&self, section: usize, writer: &mut $crate::recipe::schema::Writer) {
                let default = Self::default();
                $( $crate::recipe::schema::Table::write(&self.$inline, section, writer); )*
                $(
                    let name = stringify!($field);
                    $crate::recipe::schema::Value::write(&self.$field, name, &default.$field, section, writer);
                )*
                $( $crate::recipe::schema::Table::write(&self.$last, section, writer); )*
            }
        }

        impl $crate::recipe::schema::Value for $Table {
            fn read(
                &mut self,
                field: &$crate::recipe::schema::Field,
                node: &$crate::recipe::source::Node,
                reader: &mut $crate::recipe::reader::Reader,
            ) {
                reader.table(self, field.name, node);
            }

            fn describe(&self, field: &$crate::recipe::schema::Field) -> $crate::recipe::schema::Key {
                $crate::recipe::schema::Key {
                    name: field.name,
                    doc: field.doc.to_owned(),
                    kind: String::from("table"),
                    range: String::new(),
                    default: None,
                    required: false,
                    table: Some($crate::recipe::schema::Table::describe(self)),
                    repeated: false,
                }
            }

            fn write(&self, name: &str, _: &Self, section: usize, writer: &mut $crate::recipe::schema::Writer) {
                let section = writer.open(section, name, false);
                $crate::recipe::schema::Table::write(self, section, writer);
            }
        }
    };
    (@default) => { Default::default() };
    (@default $default:expr) => { $default };
    (@field $field:ident [$($doc:literal),*] [$($range:expr)?] [$($default:expr)?]) => {
        $crate::recipe::schema::Field {
            name: stringify!($field),
            doc: concat!($($doc, "\n"),*),
            range: $crate::recipe::schema::table!(@range $($range)?),
            required: $crate::recipe::schema::table!(@required $($default)?),
        }
    };
    (@required) => { true };
    (@required $default:expr) => { false };
    (@range) => { $crate::recipe::schema::Range::ANY };
    (@range $range:expr) => { $range };
}

/// Declares an enum whose variants are words in the recipe.
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

        impl $crate::recipe::schema::Choice for $Choice {
            const ALL: &'static [(Self, &'static str, &'static str)] =
                &[$( (Self::$Variant, $word, concat!($($doc),*)), )*];
        }

        $crate::recipe::value::choice_value!($Choice);
    };
}

pub(crate) use {choice, table};
