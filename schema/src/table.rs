//! Declares tables: one macro gives a table's struct, defaults, ranges, key list, reader, writer and reference page,
//! so that none of them can disagree with another.

use crate::{Item, Node, Range, Reader, Writer};

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

impl<T: Table> Value for T {
    fn read(&mut self, field: &Field, node: &Node, reader: &mut Reader) {
        reader.table(self, field.name, node);
    }

    fn describe(&self, field: &Field) -> Key {
        let (doc, kind, table) = (field.doc.to_owned(), "table".to_owned(), Some(Table::describe(self)));
        Key {
            name: field.name,
            doc,
            kind,
            range: String::new(),
            default: None,
            required: false,
            table,
            repeated: false,
        }
    }

    fn write(&self, name: &str, _: &Self, section: usize, writer: &mut Writer) {
        let section = writer.open(section, name, false);
        Table::write(self, section, writer);
    }
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
        let table = Some(Table::describe(&T::default()));
        let kind = String::from("list of tables");
        Key { name: field.name, doc, kind, range: String::new(), default: None, required: false, table, repeated: true }
    }

    fn write(&self, name: &str, _: &Self, section: usize, writer: &mut Writer) {
        for table in self {
            let section = writer.open(section, name, true);
            Table::write(table, section, writer);
        }
    }
}

/// Declares a recipe table. A field without a default is required; `in` gives a number's range, `named` a key that is not
/// the field's name, `when` says whether there is such a key at all. The keys of an `inline` table are written in this table
/// itself, before its own keys, those of `inline_last` after them.
#[macro_export]
macro_rules! table {
    (
        $(#[doc = $table_doc:literal])*
        pub struct $Table:ident $(<$Part:ident : $Bound:path>)? {
            $( inline $inline:ident : $Inline:ty; )*
            $(
                $(#[doc = $doc:literal])*
                pub $field:ident : $Type:ty $(= $default:expr)?
                    $(, in $range:expr)? $(, named $name:expr)? $(, when $when:expr)?;
            )*
            $( inline_last $last:ident : $Last:ty; )*
        }
    ) => {
        $(#[doc = $table_doc])*
        #[derive(Debug, Clone, PartialEq)]
        pub struct $Table $(<$Part: $Bound>)? {
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

        impl $(<$Part: $Bound>)? Default for $Table $(<$Part>)? {
            fn default() -> Self {
                Self {
                    $( $inline: <$Inline>::default(), )*
                    $( $field: $crate::table!(@default $($default)?), )*
                    $( $last: <$Last>::default(), )*
                }
            }
        }

        impl $(<$Part: $Bound>)? $crate::Table for $Table $(<$Part>)? {
            const DOC: &'static str = concat!($($table_doc, "\n"),*);

            fn take(
                &mut self,
                key: &str,
                node: &$crate::Node,
                reader: &mut $crate::Reader,
            ) -> bool {
                $( if $crate::Table::take(&mut self.$inline, key, node, reader) { return true; } )*
                $( if $crate::Table::take(&mut self.$last, key, node, reader) { return true; } )*
                $(
                    let field = $crate::table!(@field $field [$($doc),*] [$($range)?] [$($default)?] [$($name)?]);
                    if key == field.name $(&& $when)? {
                        $crate::Value::read(&mut self.$field, &field, node, reader);
                        return true;
                    }
                )*
                false
            }

            fn describe(&self) -> Vec<$crate::Key> {
                let mut keys = Vec::new();
                $( keys.extend($crate::Table::describe(&self.$inline)); )*
                $(
                    let field = $crate::table!(@field $field [$($doc),*] [$($range)?] [$($default)?] [$($name)?]);
                    if $crate::table!(@when $($when)?) {
                        keys.push($crate::Value::describe(&self.$field, &field));
                    }
                )*
                $( keys.extend($crate::Table::describe(&self.$last)); )*
                keys
            }

            fn write(&self, section: usize, writer: &mut $crate::Writer) {
                let default = Self::default();
                $( $crate::Table::write(&self.$inline, section, writer); )*
                $(
                    if $crate::table!(@when $($when)?) {
                        let name = $crate::table!(@name $field $($name)?);
                        $crate::Value::write(&self.$field, name, &default.$field, section, writer);
                    }
                )*
                $( $crate::Table::write(&self.$last, section, writer); )*
            }
        }
    };
    (@default) => { Default::default() };
    (@default $default:expr) => { $default };
    (@name $field:ident) => { stringify!($field) };
    (@name $field:ident $name:expr) => { $name };
    (@when) => { true };
    (@when $when:expr) => { $when };
    (@field $field:ident [$($doc:literal),*] [$($range:expr)?] [$($default:expr)?] [$($name:expr)?]) => {
        $crate::Field {
            name: $crate::table!(@name $field $($name)?),
            doc: concat!($($doc, "\n"),*),
            range: $crate::table!(@range $($range)?),
            required: $crate::table!(@required $($default)?),
        }
    };
    (@required) => { true };
    (@required $default:expr) => { false };
    (@range) => { $crate::Range::ANY };
    (@range $range:expr) => { $range };
}
