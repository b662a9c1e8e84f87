//! Rows packed end to end: models never see padding, and heads run only where something is wanted.

use tch::{Device, Tensor};

use crate::data::Rows;

/// b rows of N tokens in all, of which R are wanted (true among the own tokens, with a predecessor to be predicted from).
#[derive(Debug)]
pub struct PackedRows {
    /// `[N]` int64.
    pub token_ids: Tensor,
    /// `[N]` int64, position of a token in its row.
    pub positions: Tensor,
    /// `[b]` tokens of each row.
    pub lengths: Vec<i64>,
    /// `[R]` indices into `0..N` of the tokens *before* the wanted ones: where their prediction is made.
    pub predecessors: Tensor,
    /// `[R]` the wanted tokens.
    pub targets: Tensor,
    /// `[R]` where they stand in the flattened `[b, T]` rows.
    pub columns: Tensor,
    /// `[b]` index into `0..N` of each row's last token.
    pub last_tokens: Tensor,
    /// `[b, T]`.
    pub size: [i64; 2],
}

impl PackedRows {
    pub fn new(rows: &Rows, device: Device) -> PackedRows {
        let size = rows.size();
        let ids = to_vec_i64(&rows.token_ids);
        let own: Vec<bool> = Vec::try_from(rows.own.to_device(Device::Cpu).flatten(0, -1)).expect("a bool mask");
        let (mut token_ids, mut positions, mut last_tokens) = (Vec::new(), Vec::new(), Vec::new());
        let (mut predecessors, mut targets, mut columns) = (Vec::new(), Vec::new(), Vec::new());
        for (row, &length) in rows.lengths.iter().enumerate() {
            for position in 0..length {
                let column = row as i64 * size[1] + position;
                if position > 0 && own[column as usize] {
                    predecessors.push(token_ids.len() as i64 - 1);
                    targets.push(ids[column as usize]);
                    columns.push(column);
                }
                token_ids.push(ids[column as usize]);
                positions.push(position);
            }
            last_tokens.push(token_ids.len() as i64 - 1);
        }
        let tensor = |values: Vec<i64>| Tensor::from_slice(&values).to_device(device);
        PackedRows {
            token_ids: tensor(token_ids),
            positions: tensor(positions),
            lengths: rows.lengths.clone(),
            predecessors: tensor(predecessors),
            targets: tensor(targets),
            columns: tensor(columns),
            last_tokens: tensor(last_tokens),
            size,
        }
    }

    /// Lays `[R]` values out in `[b, T]` rows, 0 elsewhere; differentiable.
    pub fn to_rows(&self, values: &Tensor) -> Tensor {
        let blank = Tensor::zeros([self.size[0] * self.size[1]], (values.kind(), values.device()));
        blank.index_copy(0, &self.columns, values).view(self.size)
    }

    pub fn num_tokens(&self) -> i64 {
        self.token_ids.size()[0]
    }
}

fn to_vec_i64(tensor: &Tensor) -> Vec<i64> {
    Vec::try_from(tensor.to_device(Device::Cpu).flatten(0, -1)).expect("int64 token ids")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packing_keeps_tokens_and_finds_predecessors() {
        let tokens = Rows::of_tokens(&[
            (vec![5, 6, 7], vec![false, true, true]),
            (vec![8, 9, 10, 11], vec![true, false, false, true]), // a first token has no predecessor
        ]);
        let packed = PackedRows::new(&tokens, Device::Cpu);
        assert_eq!(to_vec_i64(&packed.token_ids), [5, 6, 7, 8, 9, 10, 11]);
        assert_eq!(to_vec_i64(&packed.positions), [0, 1, 2, 0, 1, 2, 3]);
        assert_eq!(to_vec_i64(&packed.predecessors), [0, 1, 5]);
        assert_eq!(to_vec_i64(&packed.targets), [6, 7, 11]);
        assert_eq!(to_vec_i64(&packed.last_tokens), [2, 6]);
        let rows = packed.to_rows(&Tensor::from_slice(&[1f32, 2.0, 3.0]));
        assert_eq!(rows, Tensor::from_slice(&[0f32, 1.0, 2.0, 0.0, 0.0, 0.0, 0.0, 3.0]).view([2, 4]));
    }
}
